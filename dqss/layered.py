"""Classes put before a module's own class, so that its forward can be overridden and nothing else changes.

As torch's own parametrizations do it: the module keeps name, attributes and hooks, it copies and pickles.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn


class Layered(nn.Module):
    """Goes before a module's class in a subclass of both; its subclasses override ``forward``."""

    @classmethod
    def overrides(cls) -> dict[str, Any]:
        """What the subclass has beside what it inherits."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return (_bare, _layers_of(type(self)), *state)


_MADE: dict[tuple[type[Layered], type], Any] = {}
_MADE_OF: dict[type, tuple[type[Layered], type]] = {}


def can_precede(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is its class's own, and copies of it go through that class.

    Graph modules make their own classes, and what has a way of its own to be copied would come out of it
    as it was before.
    """
    kind = type(module)
    return isinstance(module, Layered) or not (
        isinstance(module, fx.GraphModule)
        or "forward" in {*vars(module), *module._modules}
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or hasattr(kind, "__deepcopy__")
    )


def put_before(module: nn.Module, layer: type[Layered]) -> None:
    """From now on ``layer`` comes before the class of ``module``."""
    module.__class__ = _subclass(layer, type(module))


def _subclass(layer: type[Layered], base: Any) -> Any:
    """Of both; always the same one."""
    if (layer, base) not in _MADE:
        names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
        made = type(base)(base.__name__, (layer, base), names | layer.overrides())
        _MADE[layer, base], _MADE_OF[made] = made, (layer, base)
    return _MADE[layer, base]


def _layers_of(made: type) -> tuple[type, ...]:
    """The class that was there first, and those before it, from the innermost."""
    outer = list[type]()
    while made in _MADE_OF:
        layer, made = _MADE_OF[made]
        outer.insert(0, layer)
    return (made, *outer)


def _bare(base: Any, *layers: type[Layered]) -> Any:
    """A module without state: what copies and pickles begin with."""
    for layer in layers:
        base = _subclass(layer, base)
    return base.__new__(base)
