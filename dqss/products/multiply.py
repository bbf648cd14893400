"""What a product of two activations is, and how it is computed from quantized operands.

A product has no weight and no layer: it is a function called in some module's forward. Two kinds
are told apart: ``matmul`` (everything bilinear in two operands) and ``attention``, which is two
products in one function, with the probabilities between them (arXiv 1706.03762, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.choice import OPERANDS

Kind = Literal["matmul", "attention"]
MATMUL: Final = "matmul"
ATTENTION: Final = "attention"
HIDDEN: Final = "hidden"
"""What is inside a function that shows none of its operands."""
Quantize = Callable[[str, Tensor], Tensor]
"""From the name of an operand and its value to what is multiplied."""

_Slot = tuple[int, str]  # position and keyword of an argument
_FIRST_TWO: tuple[_Slot, _Slot] = (0, "input"), (1, "other")
_MATRICES: tuple[_Slot, _Slot] = (0, "input"), (1, "mat2")
_BATCHES: tuple[_Slot, _Slot] = (1, "batch1"), (2, "batch2")
_AFTER_SUM: tuple[_Slot, _Slot] = (1, "mat1"), (2, "mat2")
_SLOTS: dict[Any, tuple[_Slot, _Slot]] = {
    torch.matmul: _FIRST_TWO,
    torch.Tensor.matmul: _FIRST_TWO,  # also the operator @
    torch.linalg.matmul: _FIRST_TWO,
    torch.mm: _MATRICES,
    torch.Tensor.mm: _MATRICES,
    torch.bmm: _MATRICES,
    torch.Tensor.bmm: _MATRICES,
    torch.addmm: _AFTER_SUM,
    torch.Tensor.addmm: _AFTER_SUM,
    torch.baddbmm: _BATCHES,
    torch.Tensor.baddbmm: _BATCHES,
    torch.addbmm: _BATCHES,
    torch.Tensor.addbmm: _BATCHES,
}


@dataclass(frozen=True)
class Product:
    """One product as it was called.

    Attributes:
        kind: what it is.
        given: its operands among the arguments, in the order of
            :data:`dqss.choice.OPERANDS`.
    """

    kind: Kind | Literal["hidden"]
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: tuple[Any, ...] = ()

    def plain(self) -> Any:
        """What the function itself returns."""
        return self.func(*self.args, **self.kwargs)

    def of_real_tensors(self) -> bool:
        """Whether all operands are dense floating-point tensors and a new result is returned."""
        return bool(self.given) and all(map(is_dense, self.given)) and self.kwargs.get("out") is None

    def quantized(self, quantize: Quantize) -> Tensor:
        """The product of what ``quantize`` makes of each operand."""
        if self.kind == ATTENTION:
            return attention(*self.args, quantize=quantize, **self.kwargs)
        pairs = zip(OPERANDS[MATMUL], self.given, strict=True)
        left, right = (quantize(name, operand) for name, operand in pairs)
        if self.func is torch.einsum:
            result: Tensor = torch.einsum(self.args[0], left, right)
            return result
        args, kwargs = list(self.args), dict(self.kwargs)
        for (position, key), operand in zip(_SLOTS[self.func], (left, right), strict=True):
            if position < len(args):
                args[position] = operand
            else:
                kwargs[key] = operand
        found: Tensor = self.func(*args, **kwargs)
        return found

    def show(self, quantize: Quantize) -> None:
        """Call ``quantize`` with every operand, the probabilities among them, and keep nothing."""
        if self.kind == ATTENTION:
            self.quantized(quantize)
        else:
            for name, operand in zip(OPERANDS[MATMUL], self.given, strict=True):
                quantize(name, operand)


def is_dense(x: Any) -> bool:
    """Whether that is a floating-point tensor, neither sparse nor nested."""
    dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
    return dense and x.is_floating_point()


def as_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """The call of a torch function as a product; None for every other function."""
    if func in _SLOTS:
        given = tuple(args[at] if at < len(args) else kwargs.get(key) for at, key in _SLOTS[func])
        return Product(MATMUL, func, args, kwargs, given)
    if func is F.scaled_dot_product_attention:
        keys = ("query", "key", "value")
        given = tuple(args[at] if at < len(args) else kwargs.get(key) for at, key in enumerate(keys))
        return Product(ATTENTION, func, args, kwargs, given)
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if isinstance(args[0], str) and len(operands) == 2:
            return Product(MATMUL, func, args, kwargs, tuple(operands))
    if func is F.multi_head_attention_forward:
        return Product(HIDDEN, func, args, kwargs)
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    quantize: Quantize,
) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value`` with all four operands quantized.

    The arguments of ``torch.nn.functional.scaled_dot_product_attention``, and its values where
    ``quantize`` changes nothing: a row in which everything is masked gives zeros.

    Args:
        query: ``[..., L, E]``; bf16 and fp16 are computed in fp32 and come out in their own type.
        key: ``[..., S, E]``.
        value: ``[..., S, V]``.
        attn_mask: broadcasts to ``[..., L, S]``; True takes part, or is added to the scores.
        dropout_p: applied to the probabilities, as there; zero in a network that is in ``eval()``.
        is_causal: row i sees the keys up to i.
        scale: ``1 / sqrt(E)`` by default.
        enable_gqa: fewer heads (axis -3) of keys and values than of queries.
        quantize: called with ``query``, ``key``, ``probabilities`` and ``value``.
    """
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    query, key, value = (
        quantize(name, operand).to(wide)
        for name, operand in (("query", query), ("key", key), ("value", value))
    )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = _masked(torch.matmul(query, key.transpose(-2, -1)) * scale, attn_mask, is_causal)
    probabilities = quantize("probabilities", _softmax(scores))
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.matmul(probabilities, value).to(dtype)


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if mask is None:
        return scores
    if mask.dtype is torch.bool:
        return scores.masked_fill(mask.logical_not(), -math.inf)
    return scores + mask


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; zeros, in value and gradient, where everything is masked."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
