"""Where activations meet without a layer: additions, concatenations and averages, as they are called.

A runtime that computes integers from integers needs the operands of these quantized (as it is said of
additions and concatenations in arXiv 1712.05877, appendix A.2 and A.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.choice import POINT_OPERANDS
from dqss.products.multiply import Quantize, is_dense

MeetingKind = Literal["sum", "concatenation", "pool"]
SUM: Final = "sum"
CONCATENATION: Final = "concatenation"
POOL: Final = "pool"

_IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}
_KINDS: dict[Any, MeetingKind] = {
    **dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__), SUM),
    **dict.fromkeys(_IN_PLACE, SUM),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), CONCATENATION),
    **dict.fromkeys((torch.mean, torch.Tensor.mean), POOL),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), POOL),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), POOL),
}
_SLOTS: dict[str, tuple[str, ...]] = {SUM: ("input", "other"), CONCATENATION: ("tensors",), POOL: ("input",)}
"""Keywords of the operands, which are the first positional arguments."""


@dataclass(frozen=True)
class Meeting:
    """One addition, concatenation or average as it was called.

    Attributes:
        kind: what it is.
        given: its operands, in the order of :attr:`names`.
    """

    kind: MeetingKind
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operands."""
        return POINT_OPERANDS[self.kind] or tuple(str(index) for index in range(len(self.given)))

    def plain(self) -> Any:
        """What the function itself returns."""
        return self.func(*self.args, **self.kwargs)

    def of_real_tensors(self) -> bool:
        """Whether all operands are dense floating-point tensors and no other tensor is written to."""
        return bool(self.given) and all(map(is_dense, self.given)) and self.kwargs.get("out") is None

    def quantized(self, quantize: Quantize) -> Tensor:
        """The same of what ``quantize`` makes of each operand."""
        if self.func in _IN_PLACE:
            return self._in_place(quantize)
        found = tuple(quantize(name, x) for name, x in zip(self.names, self.given, strict=True))
        args, kwargs = list(self.args), dict(self.kwargs)
        values: tuple[Any, ...] = (found,) if self.kind == CONCATENATION else found
        for position, (key, value) in enumerate(zip(_SLOTS[self.kind], values, strict=True)):
            if position < len(args):
                args[position] = value
            else:
                kwargs[key] = value
        result: Tensor = self.func(*args, **kwargs)
        return result

    def _in_place(self, quantize: Quantize) -> Tensor:
        """Others may hold the left operand, so that the sum has to end up in it."""
        target, other = self.given
        # What quantizes it may need it as it was on the way back.
        source = target.clone() if torch.is_grad_enabled() else target
        left, right = quantize("left", source), quantize("right", other)
        options = {key: value for key, value in self.kwargs.items() if key != "other"}
        return self.returned(torch.add(left, right, **options))

    def returned(self, result: Tensor) -> Tensor:
        """``result`` as the function returns its own: in its first operand where it writes there."""
        return self.given[0].copy_(result) if self.func in _IN_PLACE else result

    def show(self, quantize: Quantize) -> None:
        """Call ``quantize`` with every operand, and keep nothing."""
        for name, operand in zip(self.names, self.given, strict=True):
            quantize(name, operand)


def as_meeting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meeting | None:
    """The call of a torch function as a meeting; None for every other function."""
    kind = _KINDS.get(func)
    if kind is None:
        return None
    given = tuple(args[at] if at < len(args) else kwargs.get(key) for at, key in enumerate(_SLOTS[kind]))
    if kind == CONCATENATION:
        given = tuple(given[0]) if isinstance(given[0], (tuple, list)) else ()
    return Meeting(kind, func, args, kwargs, given)
