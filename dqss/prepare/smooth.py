"""Ranges of channels moved from activations into the weights that read them: exact in float.

Channel i of an activation is divided by a factor by the layers that make it, and the layers that read it
multiply (SmoothQuant, arXiv 2211.10438). One scale for all channels then wastes fewer of its codes. There
it is the norm before a linear layer that divides; here any layers do, also where several add up and several
read (:mod:`dqss.prepare.groups`).

The factors of a group are those of the least expected error of rounding (:mod:`dqss.prepare.rounding_error`),
summed over all readers. What an error of a reader is worth is measured: how much the network's output changes
where it alone is quantized. What a group wins is measured too, and one that wins nothing is left as it is.

Factors are powers of the fourth root of two, so that a recipe holds them as small integers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ldexp
from typing import cast

import torch
from torch import Tensor, nn

from dqss.errors import StrategyError
from dqss.functional import broadcast_channels, channel_view, fake_quantize
from dqss.observers import Statistics
from dqss.observers.mse import MSE
from dqss.prepare.equalize import scaled_by_input
from dqss.prepare.groups import Group, find_groups
from dqss.prepare.modules import Layer, Transposed, groups_of, plain_kind
from dqss.prepare.rounding_error import RoundedLayer, best_factors
from dqss.prepare.work import Work
from dqss.spec import PerChannel, QuantSpec

_TOLERANCE = 1e-4
STEPS_AN_OCTAVE = 4
_ROOTS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""Powers of the fourth root of two, written out: no two libraries may disagree about them."""
FARTHEST = 40
"""Largest exponent: a factor of 1024."""
WORTH = 0.005
"""Share of the errors of all groups below which one is left as it is."""
SAMPLE = 1 << 14
"""Values of an input that its grid is fitted to."""


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
    """Smooth the groups of layers that gain by it, in place; ``work.bits`` says what they are quantized to.

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
    before = work.output()
    errors = {
        (group, name): _error(work, _no_factors(group, name), before)
        for group in groups
        for name in group.read
    }
    plain = {group: [errors[group, name] for name in group.read] for group in groups}
    least = WORTH * sum(errors.values())
    wanted = [_best(work, group, each) for group, each in plain.items() if sum(each) > least]
    gaining = [found for found in wanted if any(found.exponents) and _gains(work, found, before)]
    good = _apply_good(work, gaining, before)
    return [found.word for found in good] or None


def _no_factors(group: Group, *read: str) -> Smoothing:
    return Smoothing(group.made, read or group.read, (0,) * len(group.inputs[0].power))


def _best(work: Work, group: Group, errors: Sequence[float]) -> Smoothing:
    """The factors of the least expected error.

    Args:
        work: the network at hand.
        group: what they are for.
        errors: of the network's output, for each reader, where it alone is quantized and nothing is divided.
    """
    layers = [
        RoundedLayer(_layer(work, name), ranges, *work.bits(name))
        for name, ranges in zip(group.read, group.inputs, strict=True)
    ]
    ones = torch.ones(len(group.inputs[0].power), dtype=torch.float64)
    expected = [float(layer.error(ones)) for layer in layers]
    gains = [error / own if own > 0 else 0.0 for error, own in zip(errors, expected, strict=True)]
    quarters = (best_factors(layers, gains).log2() * STEPS_AN_OCTAVE).round().clamp(-FARTHEST, FARTHEST)
    return Smoothing(group.made, group.read, tuple(int(quarter) for quarter in quarters))


def _gains(work: Work, found: Smoothing, before: Sequence[Tensor]) -> bool:
    """Whether the output changes less with the factors than without, where all readers are quantized."""
    without = replace(found, exponents=(0,) * len(found.exponents))
    return _error(work, found, before) < _error(work, without, before)


def _error(work: Work, smoothing: Smoothing, before: Sequence[Tensor]) -> float:
    """Squared error of the output where the layers that read the channels are quantized, and no others."""
    with _quantized(work, smoothing):
        after = work.output()
    return sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(after, before, strict=True)
        if a.is_floating_point()
    )


@contextmanager
def _quantized(work: Work, smoothing: Smoothing) -> Iterator[None]:
    """As the layers would compute if they were given channels divided by the factors.

    Nothing is divided: what is quantized is multiplied back, so that all else stays as it is.
    """
    handles, kept = [], []
    try:
        for name in smoothing.read:
            layer, (weight_bits, bits) = _layer(work, name), work.bits(name)
            factors = smoothing.factors.to(layer.weight)
            if weight_bits is not None:
                kept.append((layer, layer.weight))
                layer.weight = _rounded(layer, factors, weight_bits)
            if bits is not None:
                handles.append(layer.register_forward_pre_hook(_rounding(factors, bits)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, old in kept:
            layer.weight = old


def _rounded(layer: Layer, factors: Tensor, bits: int) -> nn.Parameter:
    spec = QuantSpec(bits, symmetric=True, granularity=PerChannel(0))
    quantized = _on_grid(scaled_by_input(layer.weight.detach(), groups_of(layer), factors), spec)
    return nn.Parameter(scaled_by_input(quantized, groups_of(layer), 1 / factors), requires_grad=False)


def _rounding(factors: Tensor, bits: int) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        x = args[0]
        shaped = factors.reshape(-1, *[1] * (0 if isinstance(module, nn.Linear) else x.ndim - 2))
        return _on_grid(x / shaped, QuantSpec(bits, symmetric=False)) * shaped

    return hook


def _on_grid(x: Tensor, spec: QuantSpec) -> Tensor:
    """On the grid of the least squared error, which is fitted to a sample where there are many values."""
    rows = channel_view(x.detach().float(), spec.granularity)
    stats = Statistics.of(rows[:, :: max(1, rows.shape[1] // SAMPLE)])
    stats = replace(stats, minimum=rows.amin(1), maximum=rows.amax(1))
    grid = MSE().qparams(stats, spec)
    scale, zero_point = (broadcast_channels(part, x.shape, spec.granularity) for part in grid)
    return fake_quantize(x.float(), scale, zero_point, spec).to(x.dtype)


def _layer(work: Work, name: str) -> Layer:
    return cast(Layer, work.model.get_submodule(name))


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
        scaled = scaled_by_input(layer.weight.double().cpu(), groups_of(layer), factors)
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
    if work.keeps(before, _TOLERANCE):
        return list(wanted)
    for step in reversed(undo):
        step()
    good = []
    for each in wanted:
        back = _apply(work, each)
        if work.keeps(before, _TOLERANCE):
            good.append(each)
        else:
            back()
            work.notes.append(f"not smoothed, the output would change: {each.word.partition(':')[0]}")
    return good


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
    return layer.weight.shape[axis] * (groups_of(layer) if axis else 1) == channels
