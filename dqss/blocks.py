"""The blocks of a network: modules that it is made of, named by patterns or found by repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from dqss.errors import UserError, near_match

AUTO: Final = "auto"
"""In place of patterns: the blocks that a network repeats."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(
    model: nn.Module, inside: Collection[str], patterns: Sequence[str], option: str
) -> dict[str, nn.Module]:
    """The modules that ``patterns`` mean, outermost ones only, in the order of the network.

    Args:
        model: is looked at.
        inside: names of what blocks must contain: layers or products under search.
        patterns: shell patterns of module names, or :data:`AUTO` for the children of containers
            (``Sequential``, ``ModuleList``, ``ModuleDict``) whose class occurs among such children
            more than once, and which are not containers themselves. Only modules that can be called
            and have something of ``inside`` in them count.
        option: what the user calls the patterns, for errors.

    Raises:
        UserError: for a pattern that matches no such module.
    """
    if not patterns:
        return {}
    found = {
        name: module
        for name, module in model.named_modules()
        if name and _can_be_called(module) and any(one.startswith(f"{name}.") for one in inside)
    }
    repeated = repeated_blocks(model, found)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = repeated if pattern == AUTO else {name for name in found if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(_nothing(pattern, found, option))
        chosen |= matched
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    return {name: module for name, module in found.items() if name in outermost}


def repeated_blocks(model: nn.Module, found: dict[str, nn.Module]) -> set[str]:
    """Those of ``found`` that :data:`AUTO` means, whether outermost or not."""
    children = {
        name: type(found[name])
        for name in found
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _CONTAINERS)
        and not isinstance(found[name], _CONTAINERS)
    }
    count = Counter(children.values())
    return {name for name, kind in children.items() if count[kind] > 1}


def _can_be_called(module: nn.Module) -> bool:
    """Containers without a forward of their own cannot."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _nothing(pattern: str, found: dict[str, nn.Module], option: str) -> str:
    if pattern == AUTO:
        example = f"such as [{next(iter(found))}]" if found else "if there are any"
        return f"{option}={AUTO}: the network repeats no block; name modules, {example}"
    hint = near_match(pattern, found)
    return f"{option}: no module with layers under search inside matches {pattern!r}{hint}"
