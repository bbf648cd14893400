"""The mixtures of the efficient convolution: many quantizations of one tensor, one result.

    A_mix = sum_k alpha_k R_k(A)        W_mix = sum_k beta_k Q_k(W)

Both keep nothing K-fold for the backward pass: it recomputes each quantization from its
input. ``dL/dalpha_k = <dL/dA_mix, R_k(A)>``; the gradient of ``A`` passes straight through
each candidate inside its own clip range, weighted by ``alpha_k``. (arXiv 2404.08010)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from dqss import fused
from dqss.distinct import Distinct
from dqss.functional import (
    broadcast_channels,
    channel_count,
    channel_view,
    common_granularity,
    dequantize,
    fake_quantize,
    from_channel_view,
    quantize,
    refine_channels,
)
from dqss.precision import in_dtype
from dqss.remaking import offer
from dqss.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec


@dataclass(frozen=True)
class Grid:
    """One candidate's grid, ready to use.

    Attributes:
        scale, zero_point: fp32 ``[C]``, a value for each channel or group of ``spec.granularity``.
        spec: integer bounds and granularity.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def shaped(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Scale and zero point so that they broadcast against a tensor of ``shape``."""
        granularity = self.spec.granularity
        scale = broadcast_channels(self.scale, shape, granularity)
        return scale, broadcast_channels(self.zero_point, shape, granularity)

    def rows(self, shape: torch.Size, common: Granularity) -> list[Tensor]:
        """Scale and both bounds of ``code - zero_point``, each with a value a channel of ``common``."""
        parts = (self.scale, self.spec.qmin - self.zero_point, self.spec.qmax - self.zero_point)
        return [refine_channels(part, shape, self.spec.granularity, common) for part in parts]


@dataclass(frozen=True)
class ByteGrid:
    """A grid for a whole tensor whose codes, counted from its lower end, fit into a byte.

    Attributes:
        scale: in real units.
        zero: the code of zero.
        parts: scale and both bounds of ``code - zero_point``, ``[3, 1]``.
    """

    scale: float
    zero: int
    parts: Tensor


@dataclass(frozen=True)
class GridStack:
    """The grids of K candidates, side by side; those that are the same once.

    Attributes:
        scale, low, high: fp32 ``[U, C]``; the bounds are those of ``code - zero_point``.
        granularity: whose channels the C columns are.
        distinct: which of the U rows are whose.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    granularity: Granularity
    distinct: Distinct

    @classmethod
    def of(cls, grids: Sequence[Grid], shape: torch.Size, alike: Sequence[int] | None = None) -> GridStack:
        """Stack grids for tensors with the channels of ``shape``.

        Args:
            grids: of K candidates.
            shape: see above.
            alike: for each candidate the first one of the same grid; None: they all differ.
        """
        distinct = Distinct.of(range(len(grids)) if alike is None else alike, grids[0].scale.device)
        common = common_granularity(grid.spec.granularity for grid in grids)
        rows = (grids[k].rows(shape, common) for k in distinct.first)
        scale, low, high = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return cls(scale, low, high, common, distinct)

    @cached_property
    def inverse(self) -> Tensor:
        """``1 / scale``."""
        return 1 / self.scale

    @cached_property
    def parts(self) -> Tensor:
        """Scale and both bounds as one, ``[3, U, C]``."""
        return torch.stack((self.scale, self.low, self.high))

    @cached_property
    def alone(self) -> list[Tensor]:
        """The same of each of the K candidates, ``[3, C]`` in memory of their own."""
        return [self.parts[:, row].clone() for row in self.distinct.rows]

    @cached_property
    def bounds(self) -> Tensor:
        """Both bounds, ``[2, U, C]``, as the fused loops take them."""
        return fused.coded(self.parts[1:])

    @cached_property
    def ends(self) -> list[Tensor]:
        """Of each of the K candidates the least and the largest value that it does not clip, ``[2, C]``."""
        ends = torch.stack((_least(self.scale, self.low), -_least(self.scale, -self.high)))
        return [ends[:, row].clone() for row in self.distinct.rows]

    @cached_property
    def byte_grids(self) -> list[ByteGrid | None]:
        """Of each of the K candidates, where it has one grid for all and codes that fit into a byte."""
        if self.scale.shape[1] != 1:
            return [None] * len(self.distinct.rows)
        numbers = self.parts[..., 0].T.tolist()
        return [
            ByteGrid(numbers[row][0], int(-numbers[row][1]), parts)
            if numbers[row][2] - numbers[row][1] <= _BYTE
            else None
            for row, parts in zip(self.distinct.rows, self.alone, strict=True)
        ]

    def fits(self, shape: torch.Size) -> bool:
        """Whether a tensor of ``shape`` has as many channels."""
        return channel_count(shape, self.granularity) == self.scale.shape[1]


_BYTE = 255
_ULPS = 4
"""A quotient of fp32 numbers, and half a step taken from their product, are off by fewer."""


def _least(scale: Tensor, low: Tensor) -> Tensor:
    """The least fp32 number that, divided by ``scale`` and rounded, is not below ``low``."""
    infinity = torch.full_like(scale, math.inf)
    limit = torch.finfo(torch.float32).max
    least = ((low - 0.5) * scale).clamp(-limit, limit)
    for _ in range(_ULPS):
        least = torch.nextafter(least, -infinity)
    for _ in range(2 * _ULPS):
        least = torch.where(torch.round(least / scale) < low, torch.nextafter(least, infinity), least)
    return least.clamp(min=-limit)


class _MixFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, grids: GridStack) -> Tensor:
        weights = grids.distinct.pool(weights)
        ctx.save_for_backward(x, weights)
        ctx.grids = grids
        blocks = as_blocks(x, grids.granularity)
        mixed = fused.mix(x.numel() * len(weights), blocks, weights, grids.scale, grids.low, grids.high)
        return in_dtype(from_blocks(mixed, x.shape, grids.granularity), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weights = ctx.saved_tensors
        grids: GridStack = ctx.grids
        blocks, grad = (as_blocks(part, grids.granularity) for part in (x, grad_outputs[0]))
        passed, sums = fused.mix_backward(
            x.numel() * len(weights), blocks, grad, weights, grids.scale, grids.low, grids.high
        )
        sums = grids.distinct.share(sums)
        return in_dtype(from_blocks(passed, x.shape, grids.granularity), x.dtype), sums, None


def on_grid(x: Tensor, grids: GridStack, place: int) -> Tensor:
    """``x`` on the grid of the candidate at ``place``, like ``x``; without a gradient."""
    blocks = as_blocks(x, grids.granularity)
    quantized = fused.quantize(x.numel(), blocks, grids.alone[place])
    return in_dtype(from_blocks(quantized, x.shape, grids.granularity), x.dtype)


class _DrawnFakeQuantize(torch.autograd.Function):
    """The same for weights that are 1 at ``place`` and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, grids: GridStack, place: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grids, ctx.place = grids, place
        return on_grid(x, grids, place)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        return *drawn_gradients(x, grad_outputs[0], ctx.grids, ctx.place), None, None


def drawn_gradients(x: Tensor, grad: Tensor, grids: GridStack, place: int) -> tuple[Tensor, Tensor]:
    """The way back through ``on_grid``: gradients of ``x``, and of the weights ``[K]`` of all candidates.

    Args:
        x: what was quantized.
        grad: of what it was quantized to.
        grids, place: see :func:`on_grid`.
    """
    blocks, grad = (as_blocks(part, grids.granularity) for part in (x, grad))
    work, ends = x.numel() * len(grids.scale), grids.ends[place]
    passed, sums = fused.drawn_backward(work, blocks, grad, grids.scale, grids.inverse, grids.bounds, ends)
    return in_dtype(from_blocks(passed, x.shape, grids.granularity), x.dtype), grids.distinct.share(sums)


def mix_fake_quantize(
    x: Tensor, weights: Tensor, grids: GridStack | Sequence[Grid], place: int | None = None
) -> Tensor:
    """``sum_k weights[k] * fake_quantize(x, grids[k])`` for grids that do not learn.

    Args:
        x: any shape; bf16 and fp16 are mixed in fp32 and returned in their own type.
        weights: ``[K]`` fp32. With ``place`` only their gradient counts, not what they are.
        grids: K grids, or their stack.
        place: the only option with a weight, if that is known: the others are then left out on
            the way forward. On the way back all K have their gradient.

    Returns:
        A tensor like ``x``. A one-hot ``weights`` gives exactly that candidate, in value and in
        the gradient of ``x``.
    """
    stack = grids if isinstance(grids, GridStack) else GridStack.of(grids, x.shape)
    if place is None:
        mixed: Tensor = _MixFakeQuantize.apply(x, weights, stack)
        return mixed
    drawn: Tensor = _DrawnFakeQuantize.apply(x, weights, stack, place)
    source = x.detach()
    return offer(drawn, lambda: on_grid(source, stack, place))


def mix_fake_quantize_reference(x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The same as :func:`mix_fake_quantize`, written as the sum that it is; for tests."""
    parts = [fake_quantize(x, *grid.shaped(x.shape), grid.spec) for grid in grids]
    return (weights.reshape(-1, *[1] * x.ndim) * torch.stack(parts)).sum(0)


@dataclass(frozen=True)
class Codes:
    """A quantized weight at rest: integers in its shape, and the grid that turns them back.

    Integers take one byte each up to 8 bits and four above.
    """

    integers: Tensor
    grid: Grid

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> Codes:
        """Round ``weight`` to ``grid``; the codes are stored in the smallest type that holds them."""
        return cls.from_integers(quantize(weight, *grid.shaped(weight.shape), grid.spec), grid)

    @classmethod
    def from_integers(cls, codes: Tensor, grid: Grid) -> Codes:
        """From whole numbers within the grid, held as floats."""
        if grid.spec.bits > 8:
            return cls(codes.to(torch.int32), grid)
        return cls(codes.to(torch.int8 if grid.spec.qmin < 0 else torch.uint8), grid)

    def dequantize(self) -> Tensor:
        """Real values, fp32, bit for bit those of ``fake_quantize``."""
        return dequantize(self.integers.to(torch.float32), *self.grid.shaped(self.integers.shape))

    def steps(self) -> Tensor:
        """``code - zero_point``, int32, in the shape of the weight."""
        _, zero_point = self.grid.shaped(self.integers.shape)
        return self.integers.to(torch.int32) - zero_point.to(torch.int32)


_PIECE = 4096
"""Sums of more elements are compiled to ones that are more exact, and several times slower."""


@cache
def longest_piece(length: int) -> int:
    """The largest divisor of ``length`` whose sums are fast; ``length`` itself where they would be tiny."""
    pieces = (length // parts for parts in range(1, length // 256 + 1) if length % parts == 0)
    return next((piece for piece in pieces if piece <= _PIECE), length)


_INTEGERS = (torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class ByteWeight:
    """A weight of int8 codes, of which zero is zero.

    Attributes:
        codes: in the shape of the weight, ``[O, ...]``.
        scale: ``[O]`` fp32.
        total: ``[O]`` int32, the sum of each row's codes.
    """

    codes: Tensor
    scale: Tensor
    total: Tensor


@dataclass(frozen=True)
class CodeStack:
    """All candidates' codes of one weight, channels (or groups) first, for mixing in one pass.

    Candidates that give the same weight have their codes there once.

    Attributes:
        steps: ``[U, C, n]``, ``code - zero_point`` in the smallest integer type for all.
        scale: ``[U, C]`` fp32.
        shape: of the weight.
        granularity: whose channels the C rows are.
        distinct: which of the U codes are whose.
    """

    steps: Tensor
    scale: Tensor
    shape: torch.Size
    granularity: Granularity
    distinct: Distinct

    @classmethod
    def of(cls, codes: Sequence[Codes]) -> CodeStack:
        """Stack the codes of K candidates."""
        shape = codes[0].integers.shape
        common = common_granularity(code.grid.spec.granularity for code in codes)
        rows = [channel_view(code.steps(), common, fill=0) for code in codes]
        low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
        kind = next(
            kind for kind in _INTEGERS if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max
        )
        scales = [
            refine_channels(code.grid.scale, shape, code.grid.spec.granularity, common) for code in codes
        ]
        distinct = Distinct.of(range(len(codes)), scales[0].device)
        return cls(torch.stack(rows).to(kind), torch.stack(scales), shape, common, distinct)

    def merged(self, alike: Sequence[int]) -> CodeStack:
        """The same without codes that are there twice.

        Args:
            alike: for each of the K candidates, the first one that gives the same weight.
        """
        distinct = Distinct.of(alike, self.scale.device)
        if distinct.all_differ:
            return self
        kept = [self.distinct.rows[k] for k in distinct.first]
        return replace(self, steps=self.steps[kept], scale=self.scale[kept], distinct=distinct)

    def choose(self, index: int) -> Tensor:
        """The weight of one candidate, bit for bit ``codes[index].dequantize()``."""
        scale, codes = self.alone[self.distinct.rows[index]]
        return self.restore(fused.restore(codes.numel(), scale, codes))

    @cached_property
    def byte_weights(self) -> list[ByteWeight] | None:
        """Of each of the K candidates; None where codes are no bytes, or have scales for other than rows."""
        if self.steps.dtype is not torch.int8 or self.granularity not in (PerTensor(), PerChannel(0)):
            return None
        found = [self._byte_weight(scale, codes.view(self.shape)) for scale, codes in self.alone]
        return [found[row] for row in self.distinct.rows]

    @staticmethod
    def _byte_weight(scale: Tensor, codes: Tensor) -> ByteWeight:
        total = codes.flatten(1).sum(1, dtype=torch.int32)
        return ByteWeight(codes, scale.expand(len(codes)).contiguous(), total)

    @cached_property
    def alone(self) -> list[tuple[Tensor, Tensor]]:
        """Scale ``[C]`` and codes ``[C, n]`` of each row."""
        return list(zip(self.scale, self.steps, strict=True))

    @cached_property
    def pieces(self) -> Tensor:
        """The codes in pieces whose sums are fast, ``[U, C T, n / T]``."""
        distinct, channels, length = self.steps.shape
        piece = longest_piece(length)
        return self.steps.view(distinct, channels * length // piece, piece)

    def sums(self, grad: Tensor) -> Tensor:
        """Inner products ``[K]`` of all candidates with ``grad``, in the shape of the weight."""
        codes = self.pieces
        rows = self.rows(grad).reshape(codes.shape[1:])
        return self.distinct.share(fused.mix_codes_backward(codes.numel(), rows, self.scale, codes))

    def mix(self, weights: Tensor) -> Tensor:
        """The sum of all candidates, weighted with ``[K]``."""
        weights = self.distinct.pool(weights)
        return self.restore(fused.mix_codes(self.steps.numel(), weights, self.scale, self.steps))

    def restore(self, rows: Tensor) -> Tensor:
        """``[C, n]`` back in the shape of the weight."""
        return from_channel_view(rows, self.shape, self.granularity)

    def rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as fp32 ``[C, n]``."""
        return channel_view(in_dtype(weight, torch.float32), self.granularity, fill=0)

    def to(self, move: Any) -> CodeStack:
        """The same with ``move`` applied to its tensors."""
        distinct = replace(self.distinct, index=move(self.distinct.index))
        return replace(self, steps=move(self.steps), scale=move(self.scale), distinct=distinct)


class _MixCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, stack: CodeStack, place: int | None) -> Tensor:
        ctx.stack = stack
        if place is not None:
            return stack.choose(place)
        return stack.mix(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        stack: CodeStack = ctx.stack
        return stack.sums(grad_outputs[0]), None, None


def mix_codes(weights: Tensor, codes: CodeStack | Sequence[Codes], place: int | None = None) -> Tensor:
    """``sum_k weights[k] * codes[k].dequantize()`` for a frozen weight; fp32, shape of the weight.

    For ``place`` see :func:`mix_fake_quantize`.
    """
    stack = codes if isinstance(codes, CodeStack) else CodeStack.of(codes)
    result: Tensor = _MixCodes.apply(weights, stack, place)
    return result if place is None else offer(result, lambda: stack.choose(place))


def as_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` as contiguous fp32 ``[A, C, B]`` with its channels in the middle."""
    x = in_dtype(x.detach(), torch.float32).contiguous()
    if isinstance(granularity, PerTensor):
        return x.view(1, 1, -1)
    if isinstance(granularity, PerChannel) and x.ndim:
        position = granularity.axis % x.ndim
        before, after = x.shape[:position], x.shape[position + 1 :]
        return x.reshape(math.prod(before), x.shape[position], math.prod(after))
    return channel_view(x, granularity, fill=0)[None]


def from_blocks(blocks: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    """Undo :func:`as_blocks`."""
    if isinstance(granularity, PerGroup):
        return from_channel_view(blocks[0], shape, granularity)
    return blocks.reshape(shape)
