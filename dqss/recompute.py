"""What quantizers make is not kept for the way back: it is made again when it is needed.

A layer keeps its input and its weight for the gradients of both. Where these are quantizations of
one drawn option, what they were made of is at hand anyway (the quantizer keeps its own input, a
frozen weight its codes), and making them again is one pass over memory. So activations are held
once and not twice, and quantized weights not at all. Small tensors are kept: to make them again
would take longer than it is worth.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]
LARGE = 1 << 18
"""Elements of the smallest tensor that is made again: a megabyte of fp32."""


@dataclass(frozen=True)
class _Recipe:
    """How to make a tensor, or a view of one, once more."""

    make: Make
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def follow(self) -> Tensor:
        return self.make().as_strided(self.shape, self.stride, self.offset)


class _Offers:
    """Tensors alive that can be made again, by the address of their memory."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Make]] = {}

    def add(self, made: Tensor, make: Make) -> None:
        self._known[made.untyped_storage().data_ptr()] = (weakref.ref(made), made._version, make)

    @property
    def any(self) -> bool:
        """Whether there were some."""
        return bool(self._known)

    def pack(self, tensor: Tensor) -> Tensor | _Recipe:
        known = self._known.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return tensor
        made, version, make = known
        # A tensor that is gone has left its address to others; one that was written to is another.
        if made() is None or tensor._version != version:
            return tensor
        return _Recipe(make, tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.follow() if isinstance(kept, _Recipe) else kept


_open: list[_Offers] = []


class Recomputation:
    """Whether it is worth asking, tensor by tensor, what can be made again: if the last pass had any."""

    def __init__(self) -> None:
        self.worthwhile = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, what is :func:`offer`-ed is not kept by autograd for the way back."""
        offers = _Offers()
        hooks: Any = torch.autograd.graph.saved_tensors_hooks(offers.pack, offers.unpack)
        _open.append(offers)
        try:
            with hooks if self.worthwhile else nullcontext():
                yield
        finally:
            _open.pop()
            self.worthwhile = offers.any


def offer(made: Tensor, make: Make) -> Tensor:
    """Say how ``made`` can be made again, to the bit and in the same layout; gives it back."""
    if _open and made.numel() >= LARGE:
        _open[-1].add(made, make)
    return made
