"""Mixtures of quantizers that learn: one compiled pass each way, nothing kept K-fold in between.

    mix = sum_k weights[k] * Q_k(x, learned_k)

The way back recomputes every quantization from ``x`` and the learned vectors, which is all that is
kept, and has the gradients of ``x``, of the weights and of all that learns from one derivative of the
sum itself: no algorithm writes down its gradient twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
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
    """The sum, as a function of tensors alone, and its derivative.

    Shapes: ``x`` is ``[A, C, T, P]``, its channels in pieces; ``table`` holds the vectors of all
    candidates one below the other, L rows; ``weights`` is ``[K]``.
    """

    formulas: tuple[Formula, ...]

    def parts(self, x: Tensor, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Value and carrier of each candidate; see :meth:`Formula.parts`."""
        left = iter(rows)
        return [formula.parts(x, *islice(left, formula.arity)) for formula in self.formulas]

    def value(self, x: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        """The mixture of ``x``; ``table`` is ``[L, C]``."""
        values = [value for value, _ in self.parts(x, table[:, :, None, None].unbind())]
        return _weighted(values, weights)

    def gradients(
        self, x: Tensor, grad: Tensor, weights: Tensor, boost: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weights and table; those of candidate k's rows times ``boost[k]``.

        The table comes as ``[L, A, C, T, 1]``, a copy for every piece, and so for each a sum of its own:
        one long sum is compiled to something slow, and were the copies not there in memory, the
        compiler would make two passes of one.
        """
        rows = table.unbind()
        places = [row for row, owner in enumerate(self.owners) if owner is not None]

        def carrier(x: Tensor, *learning: Tensor) -> tuple[Tensor, list[Tensor]]:
            own = list(rows)
            for place, row in zip(places, learning, strict=True):
                own[place] = row
            parts = self.parts(x, own)
            return _weighted([part for _, part in parts], weights), [value for value, _ in parts]

        found: Any = torch.func.vjp(carrier, x, *(rows[place] for place in places), has_aux=True)
        _, pull, values = found
        of_x, *of_rows = pull(grad)
        of_weights = torch.stack([(grad * value).sum(3).sum() for value in values])
        of_table = [torch.zeros_like(boost[0]).expand(x.shape[1])] * len(rows)
        for place, row in zip(places, of_rows, strict=True):
            of_table[place] = row.sum((0, 2, 3)) * boost[self.owners[place]]
        return of_x, of_weights, torch.stack(of_table)

    @property
    def owners(self) -> list[int | None]:
        """For each row of the table whose it is, or None if it has no gradient."""
        return [
            k if row < formula.learning else None
            for k, formula in enumerate(self.formulas)
            for row in range(formula.arity)
        ]

    def place(self, k: int) -> slice:
        """The rows of candidate k."""
        begin = sum(formula.arity for formula in self.formulas[:k])
        return slice(begin, begin + self.formulas[k].arity)


def _weighted(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    mixed = torch.zeros_like(parts[0])
    for k, part in enumerate(parts):
        mixed = mixed + weights[k] * part
    return mixed


class _Kernels:
    """Both directions of the mixture of one tuple of formulas."""

    def __init__(self, formulas: tuple[Formula, ...]) -> None:
        self.mixture = _Mixture(formulas)
        self.value = Kernel(_named(self.mixture.value))
        self.gradients = Kernel(_named(self.mixture.gradients))


_kernels = cache(_Kernels)


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Tensor) -> Any:
        return method(*args)

    # Compiled forms are kept and counted by code object: each tuple of formulas has its own.
    function.__code__ = function.__code__.replace()
    return function


@dataclass(frozen=True)
class _Plan:
    """What of a mixture is not a tensor."""

    formulas: tuple[Formula, ...]
    granularity: Granularity
    compensate: bool
    place: int | None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, table: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(x, weights, table)
        ctx.plan = plan
        kernels = _kernels(plan.formulas)
        if plan.place is not None:
            table = table[kernels.mixture.place(plan.place)]
            kernels, weights = _kernels((plan.formulas[plan.place],)), weights.new_ones(1)
        work = x.numel() * len(weights)
        mixed = kernels.value(work, _pieces(x, plan.granularity), weights, table)
        return from_blocks(mixed, x.shape, plan.granularity).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weights, table = ctx.saved_tensors
        plan: _Plan = ctx.plan
        pieces, grad = (_pieces(part, plan.granularity) for part in (x, grad_outputs[0]))
        boost = 1 / weights.clamp(min=LEAST_SHARE) if plan.compensate else torch.ones_like(weights)
        wide = (
            table[:, None, :, None, None].expand(-1, *pieces.shape[:1], -1, pieces.shape[2], 1).contiguous()
        )
        work = x.numel() * len(weights)
        of_x, *others = _kernels(plan.formulas).gradients(work, pieces, grad, weights, boost, wide)
        return from_blocks(of_x, x.shape, plan.granularity).to(x.dtype), *others, None


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
    rows = [
        refine_channels(part, x.shape, grain, common)
        for quantizer, grain in zip(quantizers, own, strict=True)
        for part in quantizer.learned(x)
    ]
    plan = _Plan(tuple(quantizer.formula for quantizer in quantizers), common, compensate, place)
    mixed: Tensor = _Mix.apply(x, weights, torch.stack(rows), plan)
    return mixed


def apply_formula(x: Tensor, quantizer: Learns) -> Tensor:
    """``Q(x)`` of one quantizer, differentiable likewise."""
    return mix_learned(x, torch.ones(1, device=x.device), (quantizer,))
