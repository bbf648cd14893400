"""Switches of single options that stay within limits; with a second switch that pays for them if need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dqss.budget.cost import PeakCost
from dqss.budget.groups import Array
from dqss.budget.limits import Limits

TRIES = 8
"""Second switches that are counted exactly, for one that is too dear: what pairs share is not in the
sum of two single changes."""
HAIR = 1e-9
"""Relative to a limit: sums of changes are rounded, and counted exactly afterwards."""


@dataclass(frozen=True)
class Switch:
    """A decision's change to another option, with its estimated effect on the loss."""

    effect: float
    name: str
    option: int


Move = tuple[float, dict[str, int]]
"""Estimated effect, and the new options of one or two decisions."""


def within(
    switches: Sequence[Switch],
    cheaper: Sequence[Switch],
    current: Mapping[str, int],
    limits: Limits,
) -> list[Move]:
    """What can be tried, in the order of ``switches``.

    A switch that breaks a limit is joined by the second one of another decision that makes room for
    it and has the best effect; where there is none it is left out.

    Args:
        switches: that are wanted.
        cheaper: that may make room.
        current: keeps all limits.
        limits: to keep.
    """
    changes = _Changes(current, limits)
    second = np.array([changes.of(each) for each in cheaper]).reshape(len(cheaper), len(limits.limits))
    order = np.argsort([each.effect for each in cheaper], kind="stable")
    found: list[Move] = []
    for first in switches:
        move = {first.name: first.option}
        if limits.hold({**current, **move}):
            found.append((first.effect, move))
            continue
        fits = (changes.of(first) + second <= changes.room).all(-1)
        for k in [k for k in order.tolist() if fits[k] and cheaper[k].name != first.name][:TRIES]:
            both = {**move, cheaper[k].name: cheaper[k].option}
            if limits.hold({**current, **both}):
                found.append((first.effect + cheaper[k].effect, both))
                break
    return found


class _Changes:
    """What single switches change about each cost, in units of its limit."""

    def __init__(self, current: Mapping[str, int], limits: Limits) -> None:
        certain = {
            name: torch.nn.functional.one_hot(torch.tensor(current[name]), count).double()
            for name, count in limits.options.items()
        }
        self.current, self._prices = current, limits.prices(certain)
        # A peak is no sum: what is above it has to be counted exactly.
        self._sums = [not isinstance(limit.cost, PeakCost) for limit in limits.limits]
        rooms = [(limit.most - limit.cost.of(current)) / limit.scale for limit in limits.limits]
        self.room = np.array(rooms) + HAIR

    def of(self, switch: Switch) -> Array:
        """One number a limit."""
        changes = []
        for prices, is_sum in zip(self._prices, self._sums, strict=True):
            price = prices.get(switch.name) if is_sum else None
            known = 0.0 if price is None else float(price[switch.option] - price[self.current[switch.name]])
            changes.append(known)
        return np.array(changes)
