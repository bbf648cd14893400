"""The quantizer of a static algorithm: parameters from statistics, straight-through rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dqss import observers
from dqss.formula import FixedGrid
from dqss.mixing import Grid, GridStack, mix_fake_quantize, on_grid
from dqss.observers import Problem, Statistics
from dqss.precision import Move
from dqss.quantizers.base import Quantizer
from dqss.spec import Candidate


class StaticQuantizer(Quantizer):
    """A candidate whose scale and zero point are calibrated once and never learn."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, candidate: Candidate, channels: int) -> None:
        super().__init__(candidate, channels)
        self.algorithm = observers.build(candidate)
        self.formula = self.fixed = FixedGrid.of(candidate.spec)
        self.needs_gradients = self.algorithm.needs_gradients
        self.needs_batches = self.algorithm.needs_batches
        self.needs_inputs = self.algorithm.needs_inputs
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels))
        self._stack: GridStack | None = None
        """Made on first use: to make it takes longer than to quantize a small tensor."""

    @torch.no_grad()
    def calibrate(self, stats: Statistics) -> None:
        """See :meth:`Quantizer.calibrate`."""
        self.load_grid(*self.algorithm.qparams(stats, self.candidate.spec))

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.forward`."""
        if self._stack is None or not self._stack.fits(x.shape):
            self._stack = GridStack.of((self.grid(),), x.shape)
        if torch.is_grad_enabled() and x.requires_grad:
            # A mixture of one: the fused loop, with the same bits and the same gradient.
            return mix_fake_quantize(x, torch.ones(1, device=x.device), self._stack)
        return on_grid(x, self._stack, 0)

    def _apply(self, fn: Move, recurse: bool = True) -> StaticQuantizer:
        """Forget the stacked grid when the module moves to another device."""
        self._stack = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._stack = None
        super()._load_from_state_dict(*args, **kwargs)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`: nothing of it learns."""
        return self.fixed.vectors(self.scale, self.zero_point)

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        return Grid(self.scale, self.zero_point, self.candidate.spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._stack = None


@torch.no_grad()
def calibrate_all(found: Iterable[tuple[Quantizer, Statistics]]) -> None:
    """Calibrate every quantizer, each from its statistics; those alike of static algorithms at once."""
    static: list[StaticQuantizer] = []
    problems: list[Problem] = []
    for quantizer, stats in found:
        if isinstance(quantizer, StaticQuantizer):
            static.append(quantizer)
            problems.append(Problem(quantizer.algorithm, stats, quantizer.candidate.spec))
        else:
            quantizer.calibrate(stats)
    for quantizer, grid in zip(static, observers.solve_together(problems), strict=True):
        quantizer.load_grid(*grid)
