"""Mixtures of quantizers that learn: one compiled pass each way, nothing kept K-fold in between.

    mix = sum_k weights[k] * Q_k(x, learned_k)

The way back recomputes every quantization from ``x`` and the learned vectors, which is all that is
kept, and has the gradients of ``x``, of the weights and of all that learns from one derivative of the
sum itself: no algorithm writes down its gradient twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from dqss.formula import Formula
from dqss.functional import common_granularity, refine_channels
from dqss.fused import Kernel
from dqss.mixing import as_blocks, from_blocks, longest_piece
from dqss.spec import Candidate, Granularity

LEAST_SHARE = 1e-2
"""Compensated gradients are divided by a candidate's weight, but never by less than this."""


class Learns(Protocol):
    """What a mixture needs to know of a quantizer."""

    @property
    def candidate(self) -> Candidate:
        """What it is."""

    @property
    def formula(self) -> Formula:
        """What it computes."""

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the formula takes beside ``x``, ``[C]`` fp32 each."""


@dataclass(frozen=True)
class _Mixture:
    """The sum, as a function of tensors alone, and its derivative."""

    formulas: tuple[Formula, ...]

    def split(self, learned: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """The flat ``learned``, candidate by candidate."""
        begin = 0
        for formula in self.formulas:
            yield learned[begin : begin + formula.arity]
            begin += formula.arity

    def parts(self, x: Tensor, learned: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Value and carrier of each candidate; see :meth:`Formula.parts`."""
        return [
            formula.parts(x, *own) for formula, own in zip(self.formulas, self.split(learned), strict=True)
        ]

    def value(self, x: Tensor, weights: Tensor, *learned: Tensor) -> Tensor:
        """The mixture ``[A, C, T, P]``."""
        wide = [part[:, None, None] for part in learned]
        mixed = torch.zeros_like(x)
        for k, (value, _) in enumerate(self.parts(x, wide)):
            mixed = mixed + weights[k] * value
        return mixed

    def gradients(
        self, x: Tensor, grad: Tensor, weights: Tensor, boost: Tensor, *learned: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of x, weights and learned; those of candidate k's learned times ``boost[k]``."""

        def carrier(x: Tensor, *wide: Tensor) -> tuple[Tensor, list[Tensor]]:
            parts = self.parts(x, wide)
            mixed = torch.zeros_like(x)
            for k, (_, part) in enumerate(parts):
                mixed = mixed + weights[k] * part
            return mixed, [value for value, _ in parts]

        # For every piece a copy, and so a sum of its own: one long sum is compiled to something slow.
        wide = [part[:, None, None].expand(*x.shape[:-1], 1) for part in learned]
        found: Any = torch.func.vjp(carrier, x, *wide, has_aux=True)
        _, pull, values = found
        of_x, *of_wide = pull(grad)
        of_weights = torch.stack([(grad * value).sum(3).sum() for value in values])
        of_learned = [part.sum((0, 2, 3)) for part in of_wide]
        boosted = [part * boost[k] for k, own in enumerate(self.split(of_learned)) for part in own]
        return of_x, of_weights, *boosted


@dataclass(frozen=True)
class _Kernels:
    """Both directions of the mixture of one tuple of formulas."""

    formulas: tuple[Formula, ...]
    value: Kernel
    gradients: Kernel


@cache
def _kernels(formulas: tuple[Formula, ...]) -> _Kernels:
    mixture = _Mixture(formulas)
    return _Kernels(formulas, Kernel(_named(mixture.value)), Kernel(_named(mixture.gradients)))


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Tensor) -> Any:
        return method(*args)

    # Compiled forms are kept and counted by code object: each tuple of formulas has its own.
    function.__code__ = function.__code__.replace()
    return function


@dataclass(frozen=True)
class _Plan:
    """What of a mixture is not a tensor."""

    kernels: _Kernels
    granularity: Granularity
    compensate: bool
    place: int | None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, plan: _Plan, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, *learned)
        ctx.plan = plan
        kernels = plan.kernels
        if plan.place is not None:
            learned = tuple(list(_Mixture(kernels.formulas).split(learned))[plan.place])
            kernels, weights = _kernels(kernels.formulas[plan.place : plan.place + 1]), weights.new_ones(1)
        work = x.numel() * len(kernels.formulas)
        mixed = kernels.value(work, _pieces(x, plan.granularity), weights, *learned)
        return from_blocks(mixed, x.shape, plan.granularity).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weights, *learned = ctx.saved_tensors
        plan: _Plan = ctx.plan
        blocks, grad = (_pieces(part, plan.granularity) for part in (x, grad_outputs[0]))
        boost = 1 / weights.clamp(min=LEAST_SHARE) if plan.compensate else torch.ones_like(weights)
        work = x.numel() * len(weights)
        of_x, *others = plan.kernels.gradients(work, blocks, grad, weights, boost, *learned)
        of_weights, *of_learned = others
        return from_blocks(of_x, x.shape, plan.granularity).to(x.dtype), of_weights, None, *of_learned


def _pieces(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` as contiguous fp32 ``[A, C, T, P]``: its channels, each in T pieces of P."""
    blocks = as_blocks(x, granularity)
    piece = longest_piece(blocks.shape[2])
    return blocks.view(*blocks.shape[:2], blocks.shape[2] // max(piece, 1), piece)


def mix_learned(
    x: Tensor,
    weights: Tensor,
    quantizers: Sequence[Learns],
    compensate: bool = False,
    place: int | None = None,
) -> Tensor:
    """``sum_k weights[k] * Q_k(x)``, differentiable in x, the weights and all that the Q_k learn.

    Args:
        x: any shape; bf16 and fp16 are mixed in fp32 and returned in their own type.
        weights: ``[K]`` fp32.
        quantizers: K of them, static ones too.
        compensate: divide the gradients of what candidate k learns by ``max(weights[k], 1e-2)``: the
            mixture has scaled them by its weight, which would slow down the unlikely ones.
        place: the only option with a weight, if that is known: the others are then left out on
            the way forward. On the way back all K weights have their gradient.

    Returns:
        A tensor like ``x``. A one-hot ``weights`` gives exactly that candidate.
    """
    own = [quantizer.candidate.spec.granularity for quantizer in quantizers]
    common = common_granularity(own)
    learned = [
        refine_channels(part, x.shape, grain, common)
        for quantizer, grain in zip(quantizers, own, strict=True)
        for part in quantizer.learned(x)
    ]
    plan = _Plan(_kernels(tuple(q.formula for q in quantizers)), common, compensate, place)
    mixed: Tensor = _Mix.apply(x, weights, plan, *learned)
    return mixed


def apply_formula(x: Tensor, quantizer: Learns) -> Tensor:
    """``Q(x)`` of one quantizer, differentiable likewise."""
    return mix_learned(x, torch.ones(1, device=x.device), (quantizer,))
