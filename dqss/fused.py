"""The inner loops of the mixtures: eager as the reference, fused by ``torch.compile`` for speed.

One source for both, and for CPU and GPU. Fused, a mixture of K quantizations reads ``x`` once
and writes one tensor, forward and backward; eager, it makes some ten passes a candidate. Where
nothing can be compiled (no C++ compiler, say) the eager loops run, after one warning.

Shapes: ``x`` and ``grad`` are ``[A, C, B]``; ``scale``, ``low`` and ``high`` ``[K, C]`` with
bounds of ``code - zero_point``; ``weights`` ``[K]``. C is 1 per tensor. ``grids`` are the three of
them as one, ``[3, K, C]``. Where one option alone was drawn, ``quantize`` and ``encode`` get the grid of
that one, ``[3, C]``, and bytes are counted from its lower end (signed ones from 128 below); for
``drawn_backward`` there are the scales of all, their inverses, the bounds :func:`coded`, ``[2, K, C]``, and
the ``ends`` of that one, ``[2, C]``: the least and the largest value that it does not clip. Codes are
``[K, C T, n]``, each channel in T pieces: long sums are compiled to something slow.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dqss.direct import Direct, Key, key_of, watched

SMALL = 2048
"""Fewer quantizations of one element each run eager: launching a compiled kernel would cost more."""


VARIANTS = 64
"""Compiled forms of one loop at most: one for each K and kind of shape, whatever the sizes."""


_WHOLE = 1.5 * 2.0**23
"""Added to a float, it leaves the nearest whole number in the last bits, to even, in the order of integers.

Clamping these asks no questions about what is not a number; such a loss ends the search before. Codes
have at most 16 bits, and whatever is as large as 2**22 is clamped where it should be.
"""


def _quantize(x: Tensor, grid: Tensor) -> Tensor:
    step, low, high = grid[0][:, None], grid[1][:, None], grid[2][:, None]
    return torch.clamp(torch.round(x / step), low, high) * step


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
        sums.append(((grad * clipped).sum((0, 2)) * scale[k]).sum())
    return passed * grad, torch.stack(sums)


def _counted(x: Tensor, grid: Tensor) -> Tensor:
    """Codes from the lower end of the grid on."""
    step, low, high = grid[0][:, None], grid[1][:, None], grid[2][:, None]
    return torch.clamp(torch.round(x / step), low, high) - low


def _encode(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    # The sum is zero, or not a number where a value is none or infinite: such have no code.
    return _counted(x, grid).to(torch.uint8), (x * 0.0).sum()


def _encode_signed(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    return (_counted(x, grid) - 128.0).to(torch.int8), (x * 0.0).sum()


def _finish(sums: Tensor, shift: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    return (sums + shift).to(torch.float32) * factor + bias


def _turn(last: Tensor) -> Tensor:
    return last.permute(0, 3, 1, 2).contiguous()


def coded(bounds: Tensor) -> Tensor:
    """Bounds of whole numbers as ``drawn_backward`` takes them; see :data:`_WHOLE`."""
    return (bounds + _WHOLE).view(torch.int32)


def _drawn_backward(
    x: Tensor, grad: Tensor, scale: Tensor, inverse: Tensor, bounds: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    whole = 1.5 * 2.0**23  # written out: the compiler takes a float from elsewhere for one more input
    inside = (x >= ends[0][:, None]) & (x <= ends[1][:, None])
    sums = []
    for k in range(scale.shape[0]):
        # Only sums come of these codes: what a division would round otherwise, at ties, is lost in them.
        shifted = (x * inverse[k][:, None] + whole).view(torch.int32)
        clamped = torch.clamp(shifted, bounds[0, k][:, None], bounds[1, k][:, None])
        codes = clamped.view(torch.float32) - whole
        sums.append(((grad * codes).sum((0, 2)) * scale[k]).sum())
    return torch.where(inside, grad, 0.0), torch.stack(sums)


def _restore(scale: Tensor, codes: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale[:, None]


def _mix_codes(weights: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    mixed = torch.zeros(codes.shape[1:], device=codes.device)
    for k in range(codes.shape[0]):
        mixed = mixed + (weights[k] * scale[k][:, None]) * codes[k].to(torch.float32)
    return mixed


def _mix_codes_backward(grad: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    sums = torch.stack([(grad * codes[k].to(torch.float32)).sum(1) for k in range(codes.shape[0])])
    return (sums.view(*scale.shape, -1).sum(2) * scale).sum(1)


def bare(tensor: Tensor) -> Tensor:
    """The same memory as a tensor with no history: a view's base would be compiled for as well."""
    if not (tensor._is_view() or tensor.requires_grad):
        return tensor
    bare = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return bare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def no_modes() -> ExitStack:
    """Nobody's ``TorchFunctionMode`` sees what runs inside: compiled code would be traced anew each time."""
    stack = ExitStack()
    for _ in range(torch._C._len_torch_function_stack()):
        stack.enter_context(torch.overrides._pop_mode_temporarily())
    return stack


class Kernel:
    """A function in two forms; the fused one is made on first use.

    Called with how much there is to do, in elements times options, and its arguments.
    """

    broken = False
    enabled = os.environ.get("DQSS_FUSED", "1") != "0"

    def __init__(self, eager: Callable[..., Any]) -> None:
        self.eager = eager
        self.compiled: Callable[..., Any] | None = None
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._direct: dict[Key, Direct | None] = {}

    def __call__(self, work: int, *args: Tensor) -> Any:
        """Run the fused form where it pays, else the eager one; ``work`` is elements times options."""
        if not torch._C._len_torch_function_stack():
            return self._run(work, *args)
        with no_modes():
            return self._run(work, *args)

    @staticmethod
    def fuses(work: int) -> bool:
        """Whether the fused form would run."""
        return work >= SMALL and not Kernel.broken and Kernel.enabled

    def _run(self, work: int, *args: Tensor) -> Any:
        if not self.fuses(work):
            return self.eager(*args)
        key = key_of(args)
        known = self._direct.get(key) if key is not None else None
        return self._compiled(key, args) if known is None else known(args)

    def _compiled(self, key: Key | None, args: tuple[Tensor, ...]) -> Any:
        """The long way, which is watched the first time that it is gone with such arguments."""
        if self.compiled is None:
            # It reports a CUDA toolkit without a GPU as if that were trouble.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            self.compiled = torch.compile(self.eager, dynamic=True)
        try:
            plain = [bare(arg) for arg in args]
            with self._room_for(args):
                if key is None or key in self._direct:
                    return self.compiled(*plain)
                result, self._direct[key] = watched(self.compiled, plain)
                return result
        except Exception as error:
            # Whatever the compiler trips over, the eager form computes the same.
            Kernel.broken = True
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"torch.compile does not work here, going on without it: {first}", stacklevel=2)
            return self.eager(*args)

    def _room_for(self, args: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Allow another form if these shapes may need one: to say so takes longer than a small kernel."""
        shapes = tuple(arg.shape for arg in args)
        if shapes in self._seen:
            return nullcontext()
        self._seen.add(shapes)
        room: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=VARIANTS)
        return room


quantize = Kernel(_quantize)
encode = Kernel(_encode)
encode_signed = Kernel(_encode_signed)
finish = Kernel(_finish)
turn = Kernel(_turn)
drawn_backward = Kernel(_drawn_backward)
restore = Kernel(_restore)
mix = Kernel(_mix)
mix_backward = Kernel(_mix_backward)
mix_codes = Kernel(_mix_codes)
mix_codes_backward = Kernel(_mix_codes_backward)


@contextmanager
def fused(enabled: bool) -> Iterator[None]:
    """Switch fusing on or off inside; ``DQSS_FUSED=0`` in the environment switches it off."""
    before = Kernel.enabled
    Kernel.enabled = enabled
    try:
        yield
    finally:
        Kernel.enabled = before
