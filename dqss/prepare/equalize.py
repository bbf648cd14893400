"""Cross-layer equalization of weights (arXiv 1906.04721, section 4.1): exact in float, easier to round.

Channel i of a layer is divided by s_i and the next layer's weight for it multiplied, with
``s_i = sqrt(r1_i / r2_i)`` of the largest weights on both sides, which then are the same; pairs are
visited again until nothing moves. A ReLU6 between them gets a cap of ``6 / s_i``, which the integer
runtime computes in float: that is the price of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.errors import StrategyError
from dqss.prepare.chains import Chain, find_chains, is_relu6
from dqss.prepare.modules import Layer, Transposed, groups_of, plain_kind, replace
from dqss.prepare.work import Work

_TOLERANCE = 1e-4
ROUNDS, SETTLED = 40, 1e-3
"""Visits of all pairs at most, and the largest logarithm of a factor at which nothing moves any more."""


class ChannelCaps(nn.Module):
    """``min(relu(x), cap)`` with a cap for each channel on axis 1: ReLU6 of a rescaled input.

    Attributes:
        cap: ``[C]``.
    """

    cap: Tensor

    def __init__(self, cap: Tensor) -> None:
        super().__init__()
        self.register_buffer("cap", cap)

    def forward(self, x: Tensor) -> Tensor:
        """Any ``[N, C, ...]``."""
        return torch.minimum(F.relu(x), self.cap.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2)))


def equalize(work: Work, recorded: Collection[str]) -> list[str] | None:
    """Equalize every chain of two layers, in place; see :func:`dqss.prepare.chains.find_chains`.

    A chain that changes the model's output by more than 1e-4 is left, with a note; so are layers that
    start no chain.

    Args:
        work: the network at hand.
        recorded: on replay, the chains; found anew otherwise.

    Returns:
        The chains that were equalized as :attr:`Chain.word`, or None if there are none.
    """
    if work.replay:
        chains = [_recorded(work, word) for word in recorded]
        _apply(work, chains)
        return [chain.word for chain in chains] or None
    chains, left = find_chains(work)
    if left:
        work.notes.append(f"not equalized, alone in no chain: {', '.join(left)}")
    if not chains:
        return None
    before = work.output()
    bad = _apply_good(work, chains, before)
    if bad:
        work.notes.append(f"not equalized, the output would change: {', '.join(chain.word for chain in bad)}")
    return [chain.word for chain in chains if chain not in bad] or None


def factors(first: Tensor, second: Tensor) -> Tensor:
    """``sqrt(r1 / r2)`` for each channel; 1 for one without weights on either side.

    Args:
        first, second: ``[C]``: the largest weights that make, and that read, each channel.
    """
    usable = (first > 0) & (second > 0)
    return torch.where(usable, torch.sqrt(first / torch.where(usable, second, 1.0)), 1.0)


def by_input(weight: Tensor, groups: int) -> Tensor:
    """Weights that read each input channel, ``[I, m]``, of a convolution ``[O, I / groups, ...]``."""
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1).flatten(1)


def scaled_by_input(weight: Tensor, groups: int, factor: Tensor) -> Tensor:
    """The weight with what reads channel i multiplied by ``factor[i]``."""
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    wide = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (parts * wide).reshape(weight.shape)


@dataclass
class _Scales:
    """Of one layer: the largest weight for each pair of channels, and the factors found so far."""

    layer: Layer
    sizes: Tensor
    groups: int
    made: Tensor
    taken: Tensor

    @classmethod
    def of(cls, layer: Layer) -> _Scales:
        weight = layer.weight.detach()
        sizes = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
        groups = groups_of(layer)
        ones = torch.ones(len(weight), dtype=torch.float64)
        taken = torch.ones(sizes.shape[1] * groups, dtype=torch.float64)
        return cls(layer, sizes.double().cpu(), groups, ones, taken)

    def weight(self) -> Tensor:
        """The layer's weight with all factors, rounded once."""
        weight = self.layer.weight.detach()
        wide = scaled_by_input(weight.double().cpu(), self.groups, self.taken)
        return (wide / self.made.reshape(-1, *[1] * (weight.ndim - 1))).to(weight)


def _apply(work: Work, chains: Sequence[Chain]) -> Callable[[], None]:
    """Equalize ``chains``; returns what undoes it. In double precision, rounded once at the end."""
    names = dict.fromkeys(name for chain in chains for name in (chain.first, chain.second))
    scales = {name: _Scales.of(cast(Layer, work.model.get_submodule(name))) for name in names}
    for _ in range(ROUNDS):
        moved = 0.0
        for chain in chains:
            one, other = scales[chain.first], scales[chain.second]
            s = factors(one.sizes.amax(1), by_input(other.sizes, other.groups).amax(1))
            one.sizes = one.sizes / s[:, None]
            other.sizes = scaled_by_input(other.sizes, other.groups, s)
            one.made, other.taken = one.made * s, other.taken * s
            moved = max(moved, float(s.log().abs().max()))
        if moved < SETTLED:
            break
    undo = [_set(found.layer, found.weight(), found.made) for found in scales.values()]
    undo += [_set_cap(work, chain.cap, scales[chain.first].made) for chain in chains if chain.cap]

    def back() -> None:
        for step in reversed(undo):
            step()

    return back


def _apply_good(work: Work, chains: Sequence[Chain], before: Sequence[Tensor]) -> list[Chain]:
    """Equalize all that keep the output; returns those that had to stay."""
    undo = _apply(work, chains)
    if work.keeps(before, _TOLERANCE):
        return []
    undo()
    # A recipe repeats what is left all at once: what was tried one by one is tried so again.
    good = [chain for chain in chains if _alone(work, chain, before)]
    if len(good) < len(chains) and good:
        undo = _apply(work, good)
        if work.keeps(before, _TOLERANCE):
            return [chain for chain in chains if chain not in good]
        undo()
    return list(chains)


def _alone(work: Work, chain: Chain, before: Sequence[Tensor]) -> bool:
    undo = _apply(work, [chain])
    same = work.keeps(before, _TOLERANCE)
    undo()
    return same


def _set(layer: Layer, weight: Tensor, made: Tensor) -> Callable[[], None]:
    old = layer.weight, layer.bias
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = (layer.bias.detach().double().cpu() / made).to(layer.bias)
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    def undo() -> None:
        layer.weight, layer.bias = old

    return undo


def _set_cap(work: Work, name: str, factor: Tensor) -> Callable[[], None]:
    old = work.model.get_submodule(name)
    device = next((p.device for p in work.model.parameters()), torch.device("cpu"))
    cap = float(cast(nn.Hardtanh, old).max_val) / factor
    new = ChannelCaps(cap.float().to(device)).eval()
    replace(work.model, old, new)

    def undo() -> None:
        replace(work.model, new, old)

    return undo


def _recorded(work: Work, word: str) -> Chain:
    modules = dict(work.model.named_modules())
    first, *cap, second = word.split(">")
    layers = [modules.get(name) for name in (first, second)]
    known = all(m is not None and plain_kind(m) and not isinstance(m, Transposed) for m in layers)
    if not known or len(cap) > 1 or any(name not in modules or not is_relu6(modules[name]) for name in cap):
        raise StrategyError(f"the strategy is for another model: it equalizes {word!r}")
    return Chain(first, second, cap[0] if cap else None)
