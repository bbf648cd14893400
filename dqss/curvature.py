"""HAWQ-V2's estimate of what each option costs: the mean curvature of its tensor, times its squared error.

Both come on the way, from hooks on the quantizers: squared errors of what passes, and of each backward pass
along a random vector z with ``E[zz'] = H`` (:mod:`dqss.sensitivity`) the squared norm of the gradient, whose
mean is the trace of ``J'HJ``, J being the derivative of the output by the tensor (arXiv 1911.03852).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dqss.mixed import MixedQuantizer, MixedWeight
from dqss.supernet import Supernet

WATCHED = 32
"""Inputs whose squared errors are taken: their mean is known far better than the curvature's."""


@dataclass(frozen=True)
class Pass:
    """What one backward pass said of a decision.

    Attributes:
        norms: squared norm of the gradient of each of its tensors.
        exact: ``J'z`` of the tensors as they would be in float: what ``s_k`` is of option k.
    """

    norms: tuple[float, ...]
    exact: float


@dataclass
class _Tensor:
    """What is known of one quantizer's tensor.

    Attributes:
        role: what it quantizes.
        squares: ``[K]`` fp64, summed squared errors of the options.
        calls: whose errors are in that sum.
        size: values a call.
        norm, exact: of the last backward pass, see :class:`Pass`.
    """

    role: str
    squares: Tensor
    calls: int = 0
    size: int = 0
    norm: float = 0.0
    exact: float = 0.0


@dataclass
class Curvature:
    """What costs each option by its tensor's mean curvature; made by :func:`watching`.

    Attributes:
        tensors: by decision, of each quantizer that it rules.
        listening: whether backward passes count; one along the loss's own gradient says nothing here.
    """

    tensors: dict[str, list[_Tensor]] = field(default_factory=dict)
    listening: bool = True

    def take(self) -> dict[str, Pass]:
        """What the last backward pass said, by decision; gone then."""
        found = {}
        for name, each in self.tensors.items():
            found[name] = Pass(tuple(tensor.norm for tensor in each), sum(tensor.exact for tensor in each))
            for tensor in each:
                tensor.norm = tensor.exact = 0.0
        return found

    def costs(self, norms: dict[str, list[float]]) -> dict[str, Tensor]:
        """``[K]`` fp64 by decision: half the mean curvature times the squared error, a sum over its tensors.

        Args:
            norms: mean squared norms, as in :class:`Pass`.
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
def watching(supernet: Supernet) -> Iterator[Curvature]:
    """Watch the quantizers of a supernet whose passes inside have one input each, or few.

    Args:
        supernet: calibrated, and pinned (:meth:`Supernet.pinned`).
    """
    curvature = Curvature()
    handles = []
    for quantizer in supernet.quantizers():
        tensor = _Tensor(quantizer.role.value, torch.zeros(len(quantizer.candidates), dtype=torch.float64))
        curvature.tensors.setdefault(quantizer.decision.name, []).append(tensor)
        handles.append(quantizer.register_forward_hook(_Hook(curvature, tensor)))
    try:
        yield curvature
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Hook:
    """Of one quantizer, after each pass."""

    curvature: Curvature
    tensor: _Tensor

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(quantizer, MixedQuantizer)
        x = args[0].detach()
        if self.tensor.calls < (1 if isinstance(quantizer, MixedWeight) else WATCHED):
            self._compare(quantizer, x)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._weigh(gradient, x))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _compare(self, quantizer: MixedQuantizer, x: Tensor) -> None:
        squares = [
            (_quantized(quantizer, k, x) - x).double().square().sum() for k in range(len(self.tensor.squares))
        ]
        self.tensor.squares += torch.stack(squares).cpu()
        self.tensor.calls, self.tensor.size = self.tensor.calls + 1, x.numel()

    @torch.no_grad()
    def _weigh(self, gradient: Tensor, x: Tensor) -> None:
        if not self.curvature.listening:
            return
        own = gradient.double()
        self.tensor.norm += float(own.square().sum())
        self.tensor.exact += float((own * x).sum())


def _quantized(quantizer: MixedQuantizer, option: int, x: Tensor) -> Tensor:
    if isinstance(quantizer, MixedWeight):
        return quantizer.stack.choose(option)
    found: Tensor = quantizer[option](x)
    return found
