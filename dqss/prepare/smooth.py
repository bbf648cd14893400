"""Ranges of channels moved from activations into the weights that read them: exact in float.

Channel i is divided by ``s_i = a_i^strength / w_i^(1 - strength)`` of the largest activation and the largest
weight that reads it (SmoothQuant, arXiv 2211.10438, eq. 4), by the layers that make it; the layers that read
it multiply. One scale for all channels then wastes fewer of its codes. There it is the norm before a
linear layer that divides; here any layers do, also where several add up and several read
(:mod:`dqss.prepare.groups`).

Factors are powers of the fourth root of two, so that a recipe holds them as small integers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ldexp
from typing import cast

import torch
from torch import Tensor, nn

from dqss.calls import tensors_in
from dqss.errors import StrategyError
from dqss.prepare.equalize import by_input, scaled_by_input
from dqss.prepare.groups import Group, find_groups
from dqss.prepare.modules import Layer, Transposed, plain_kind
from dqss.prepare.work import Work, difference, run, tolerance

_TOLERANCE = 1e-4
STEPS_AN_OCTAVE = 4
_ROOTS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""Powers of the fourth root of two, written out: no two libraries may disagree about them."""
FARTHEST = 40
"""Largest exponent: a factor of 1024."""


@dataclass(frozen=True)
class Smoothing:
    """One group with the exponents of its factors.

    Attributes:
        made, read: names of the layers that divide, and of those that multiply.
        exponents: one a channel, in quarters of an octave.
    """

    made: tuple[str, ...]
    read: tuple[str, ...]
    exponents: tuple[int, ...]

    @property
    def word(self) -> str:
        """As a recipe writes it: ``conv1+conv2>conv3:0,-3,5``."""
        return f"{'+'.join(self.made)}>{'+'.join(self.read)}:{','.join(map(str, self.exponents))}"

    @property
    def factors(self) -> Tensor:
        """``[C]``, double."""
        parts = (divmod(exponent, STEPS_AN_OCTAVE) for exponent in self.exponents)
        return torch.tensor([ldexp(_ROOTS[root], octave) for octave, root in parts], dtype=torch.float64)


def smooth(work: Work, recorded: Collection[str]) -> list[str] | None:
    """Smooth every group of layers, in place, with ``work.smoothing`` for the strength.

    A group that changes the model's output by more than 1e-4 is left, with a note.

    Args:
        work: the network at hand.
        recorded: on replay, the groups with their factors; found anew otherwise.

    Returns:
        The groups that were smoothed as :attr:`Smoothing.word`, or None if there are none.
    """
    if work.replay:
        for word in recorded:
            _apply(work, _recorded(work, word))
        return list(recorded) or None
    groups, left = find_groups(work)
    if left:
        work.notes.append(f"not smoothed, their channels are not layers' alone: {', '.join(left)}")
    before = [tensor.clone() for tensor in tensors_in(run(work.model, work.inputs))]
    wanted = [_smoothing(work, group) for group in groups]
    good = _apply_good(work, [found for found in wanted if any(found.exponents)], before)
    return [found.word for found in good] or None


def exponents(activations: Tensor, weights: Sequence[Tensor], strength: float) -> list[int]:
    """Of the factors of one group, their mean 0; 0 for channels that nothing makes or nothing reads.

    Args:
        activations: ``[C]``, the largest absolute value of each channel.
        weights: for each layer that reads them, ``[C]``: its largest weight for each channel.
        strength: 1 makes all channels' ranges the same, 0 all columns of weights.
    """
    # Each layer's weights have scales of their own: only their sizes to one another matter.
    sizes = torch.stack([each / each.max().clamp(min=1e-30) for each in weights]).amax(0).double()
    live = (activations > 0) & (sizes > 0)
    if not live.any():
        return [0] * len(live)
    logs = strength * activations[live].double().log2() - (1 - strength) * sizes[live].log2()
    found = torch.zeros(len(live), dtype=torch.int64)
    found[live] = ((logs - logs.mean()) * STEPS_AN_OCTAVE).round().clamp(-FARTHEST, FARTHEST).long()
    return [int(exponent) for exponent in found]


def _smoothing(work: Work, group: Group) -> Smoothing:
    readers = [_layer(work, name) for name in group.read]
    weights = [by_input(layer.weight.detach(), _groups(layer)).abs().amax(1).cpu() for layer in readers]
    found = exponents(group.ranges, weights, work.smoothing)
    return Smoothing(group.made, group.read, tuple(found))


def _layer(work: Work, name: str) -> Layer:
    return cast(Layer, work.model.get_submodule(name))


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


@torch.no_grad()
def _apply(work: Work, smoothing: Smoothing) -> Callable[[], None]:
    """In double precision, rounded once for each layer; returns what undoes it."""
    factors = smoothing.factors
    layers = [_layer(work, name) for name in dict.fromkeys([*smoothing.made, *smoothing.read])]
    old = [(layer, layer.weight, layer.bias) for layer in layers]
    for name in smoothing.made:
        layer = _layer(work, name)
        shaped = factors.reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight = _like(layer.weight, layer.weight.double().cpu() / shaped)
        if layer.bias is not None:
            layer.bias = _like(layer.bias, layer.bias.double().cpu() / factors)
    for name in smoothing.read:
        layer = _layer(work, name)
        scaled = scaled_by_input(layer.weight.double().cpu(), _groups(layer), factors)
        layer.weight = _like(layer.weight, scaled)

    def undo() -> None:
        for layer, weight, bias in old:
            layer.weight, layer.bias = weight, bias

    return undo


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old), requires_grad=old.requires_grad)


def _apply_good(work: Work, wanted: Sequence[Smoothing], before: Sequence[Tensor]) -> list[Smoothing]:
    """Smooth all that keep the output; returns those."""
    undo = [_apply(work, each) for each in wanted]
    if _same(work, before):
        return list(wanted)
    for step in reversed(undo):
        step()
    good = []
    for each in wanted:
        back = _apply(work, each)
        if _same(work, before):
            good.append(each)
        else:
            back()
            work.notes.append(f"not smoothed, the output would change: {each.word.partition(':')[0]}")
    return good


def _same(work: Work, before: Sequence[Tensor]) -> bool:
    after = list(tensors_in(run(work.model, work.inputs)))
    allowed = tolerance(_TOLERANCE, *before)
    return all(difference(a, b) <= allowed for a, b in zip(before, after, strict=True))


def _recorded(work: Work, word: str) -> Smoothing:
    try:
        names, _, numbers = word.rpartition(":")
        made, read = (tuple(part.split("+")) for part in names.split(">"))
        found = Smoothing(made, read, tuple(int(number) for number in numbers.split(",")))
        modules = dict(work.model.named_modules())
        fits = all(_fits(modules.get(name), len(found.exponents), 0) for name in made)
        fits = fits and all(_fits(modules.get(name), len(found.exponents), 1) for name in read)
    except ValueError:
        fits = False
    if not fits:
        raise StrategyError(f"the strategy is for another model: it smooths {word.partition(':')[0]!r}")
    return found


def _fits(module: nn.Module | None, channels: int, axis: int) -> bool:
    """Whether a layer has so many channels where it makes (axis 0) or reads (1) them."""
    if module is None or plain_kind(module) is None or isinstance(module, Transposed):
        return False
    layer = cast(Layer, module)
    return layer.weight.shape[axis] * (_groups(layer) if axis else 1) == channels
