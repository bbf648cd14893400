"""HAWQ-V2's estimate of what each option costs: the mean curvature of its tensor, times its squared error.

Both come on the way, from hooks on the quantizers: squared errors of inputs as they pass, and of each
backward pass along a random vector z with ``E[zz'] = H`` (:mod:`dqss.sensitivity`) the squared norm of the
gradient, whose mean is the trace of ``J'HJ``, J being the derivative of the output by the tensor (arXiv
1911.03852).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dqss.mixed import MixedQuantizer, MixedWeight
from dqss.supernet import Assignment, Supernet

WATCHED = 32
"""Inputs whose squared errors are taken: their mean is known far better than the curvature's."""


@dataclass
class _Tensor:
    """What is known of one quantizer's tensor.

    Attributes:
        role: what it quantizes.
        squares: ``[K]`` fp64, summed squared differences of the options to the one assigned.
        calls: whose differences are in that sum; a weight's are those of one read.
        size: values a call.
        norm: squared norm of the gradient, of the last backward pass.
    """

    role: str
    squares: Tensor
    calls: int = 0
    size: int = 0
    norm: float = 0.0


@dataclass
class Curvature:
    """What costs each option by its tensor's mean curvature; made by :func:`watching`.

    Attributes:
        tensors: by decision, of each quantizer that it rules.
    """

    tensors: dict[str, list[_Tensor]] = field(default_factory=dict)

    def take(self) -> dict[str, list[float]]:
        """Squared norms of the gradients of the last backward pass, by decision and tensor; gone then."""
        found = {name: [tensor.norm for tensor in each] for name, each in self.tensors.items()}
        for each in self.tensors.values():
            for tensor in each:
                tensor.norm = 0.0
        return found

    def costs(self, norms: dict[str, list[float]]) -> dict[str, Tensor]:
        """``[K]`` fp64 by decision: half the mean curvature times the squared error, a sum over its tensors.

        Args:
            norms: mean squared norms, as :meth:`take` has them.
        """
        found = {}
        for name, each in self.tensors.items():
            parts = [
                0.5 * norm / max(tensor.size, 1) * tensor.squares / max(tensor.calls, 1)
                for tensor, norm in zip(each, norms[name], strict=True)
            ]
            found[name] = torch.stack(parts).sum(0)
        return found

    @property
    def roles(self) -> dict[str, str]:
        """What each decision is about: that of its first tensor."""
        return {name: each[0].role for name, each in self.tensors.items()}


@contextmanager
def watching(supernet: Supernet, assignment: Assignment) -> Iterator[Curvature]:
    """Watch the quantizers of a supernet whose passes inside have one input each, or few.

    Args:
        supernet: calibrated, and pinned to ``assignment`` (:meth:`Supernet.pinned`).
        assignment: an option for every decision; errors are differences to these.
    """
    curvature = Curvature()
    handles = []
    for quantizer in supernet.quantizers():
        at = assignment[quantizer.decision.name]
        tensor = _Tensor(quantizer.role.value, torch.zeros(len(quantizer.candidates), dtype=torch.float64))
        if isinstance(quantizer, MixedWeight):
            _compare_weights(tensor, quantizer, at)
        curvature.tensors.setdefault(quantizer.decision.name, []).append(tensor)
        handles.append(quantizer.register_forward_hook(_Hook(tensor, at)))
    try:
        yield curvature
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _compare_weights(tensor: _Tensor, quantizer: MixedWeight, at: int) -> None:
    own = quantizer.stack.choose(at)
    options = range(len(quantizer.candidates))
    squares = [(quantizer.stack.choose(k) - own).double().square().sum() for k in options]
    tensor.squares, tensor.calls, tensor.size = torch.stack(squares).cpu(), 1, own.numel()


@dataclass
class _Hook:
    """Of one quantizer, after each pass."""

    tensor: _Tensor
    at: int

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, MixedQuantizer)
        if not isinstance(quantizer, MixedWeight) and self.tensor.calls < WATCHED:
            self._compare(quantizer, args[0])
        if output.requires_grad:
            output.register_hook(self._weigh)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _compare(self, quantizer: MixedQuantizer, x: Tensor) -> None:
        own = quantizer[self.at](x)
        options = range(len(quantizer.candidates))
        squares = torch.stack([(quantizer[k](x) - own).double().square().sum() for k in options])
        self.tensor.squares += squares.cpu()
        self.tensor.calls, self.tensor.size = self.tensor.calls + 1, x.numel()

    def _weigh(self, gradient: Tensor) -> None:
        self.tensor.norm += float(gradient.detach().double().square().sum())
