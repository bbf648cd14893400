"""The inner loops of the mixtures: eager as the reference, fused by ``torch.compile`` for speed.

One source for both, and for CPU and GPU. Fused, a mixture of K quantizations reads ``x`` once
and writes one tensor, forward and backward; eager, it makes some ten passes a candidate. Where
nothing can be compiled (no C++ compiler, say) the eager loops run, after one warning.

Shapes: ``x`` and ``grad`` are ``[A, C, B]``; ``scale``, ``low`` and ``high`` ``[K, C]`` with
bounds of ``code - zero_point``; ``weights`` ``[K]``. C is 1 per tensor.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

SMALL = 4096
"""Tensors of fewer elements run eager: launching a compiled kernel would cost more."""


VARIANTS = 64
"""Compiled forms of one loop at most: one for each K and kind of shape, whatever the sizes."""


def _mix(x: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    mixed = torch.zeros_like(x)
    for k in range(scale.shape[0]):
        step = scale[k][:, None]
        codes = torch.clamp(torch.round(x / step), low[k][:, None], high[k][:, None])
        mixed = mixed + (weights[k] * step) * codes
    return mixed


def _mix_backward(
    x: Tensor, grad: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    passed = torch.zeros_like(x)
    sums = []
    for k in range(scale.shape[0]):
        step = scale[k][:, None]
        codes = torch.round(x / step)
        clipped = torch.clamp(codes, low[k][:, None], high[k][:, None])
        passed = passed + torch.where(codes == clipped, weights[k], 0.0)
        sums.append((grad * (clipped * step)).sum())
    return passed * grad, torch.stack(sums)


def _mix_codes(weights: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    mixed = torch.zeros(codes.shape[1:], device=codes.device)
    for k in range(codes.shape[0]):
        mixed = mixed + (weights[k] * scale[k][:, None]) * codes[k].to(torch.float32)
    return mixed


def _mix_codes_backward(grad: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    return torch.stack(
        [(grad * (codes[k].to(torch.float32) * scale[k][:, None])).sum() for k in range(codes.shape[0])]
    )


def _bare(tensor: Tensor) -> Tensor:
    """The same memory as a tensor with no history: a view's base would be compiled for as well."""
    bare = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return bare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _no_modes() -> ExitStack:
    """Nobody's ``TorchFunctionMode`` sees what runs inside: compiled code would be traced anew each time."""
    stack = ExitStack()
    for _ in range(torch._C._len_torch_function_stack()):
        stack.enter_context(torch.overrides._pop_mode_temporarily())
    return stack


class _Kernel:
    """A function in two forms; the fused one is made on first use."""

    broken = False
    enabled = os.environ.get("DQSS_FUSED", "1") != "0"

    def __init__(self, eager: Callable[..., Any]) -> None:
        self.eager = eager
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, size: int, *args: Tensor) -> Any:
        with _no_modes():
            return self._run(size, *args)

    def _run(self, size: int, *args: Tensor) -> Any:
        if size < SMALL or _Kernel.broken or not _Kernel.enabled:
            return self.eager(*args)
        if self.compiled is None:
            # It reports a CUDA toolkit without a GPU as if that were trouble.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            self.compiled = torch.compile(self.eager, dynamic=True)
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return self.compiled(*(_bare(arg) for arg in args))
        except Exception as error:
            # Whatever the compiler trips over, the eager form computes the same.
            _Kernel.broken = True
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"torch.compile does not work here, going on without it: {first}", stacklevel=2)
            return self.eager(*args)


mix = _Kernel(_mix)
mix_backward = _Kernel(_mix_backward)
mix_codes = _Kernel(_mix_codes)
mix_codes_backward = _Kernel(_mix_codes_backward)


@contextmanager
def fused(enabled: bool) -> Iterator[None]:
    """Switch fusing on or off inside; ``DQSS_FUSED=0`` in the environment switches it off."""
    before = _Kernel.enabled
    _Kernel.enabled = enabled
    try:
        yield
    finally:
        _Kernel.enabled = before
