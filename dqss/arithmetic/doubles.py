"""Functions without an exact result, in fp64 and rounded to fp32 once.

Softmax, layer norms, sigmoids and sums of real numbers come out of every library with other last bits. In
fp64 these are some 1e-16 apart, and hardly ever (1e-16 over 1e-8, as an estimate) is a border of fp32's
roundings in between: rounded, the results are the same. Elementwise operations that IEEE 754 rounds once
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqss.arithmetic.erfc import erf, gelu, tanh_gelu

_Rule: TypeAlias = Callable[..., Tensor]


class Doubles(TorchFunctionMode):
    """Computes such functions of fp32 tensors so; see :mod:`dqss.deploy.doubles` for files."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        tensors = [x for x in _tensors((*args, *kwargs.values())) if x.is_floating_point()]
        plain = kwargs.get("out") is None and all(x.dtype is torch.float32 for x in tensors)
        if (
            rule is None
            or not tensors
            or not plain
            or (func is F.linear and not _has_weight(*args, **kwargs))
        ):
            return func(*args, **kwargs)
        found = rule(*args, **kwargs)
        return tensors[0].copy_(found) if func in _IN_PLACE or kwargs.get("inplace") else found


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _has_weight(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a linear function is a layer's own, not the sum of its codes."""
    return isinstance(weight, nn.Parameter)


def rounded_once(func: Callable[..., Tensor]) -> _Rule:
    """``func`` of fp32 tensors, in fp64."""

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        wide = {key: _wide(value) for key, value in kwargs.items()}
        return func(*(_wide(value) for value in args), **wide).float()

    return rule


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_wide, value)) if type(value) in (tuple, list) else value
    return torch.float64 if value is torch.float32 else value


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    eps = float(torch.tensor(eps))  # an fp32 number in files
    return _norm(input, normalized_shape, weight, bias, eps)


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    return (tanh_gelu if approximate == "tanh" else gelu)(input.double()).float()


def _erf(input: Tensor) -> Tensor:
    return erf(input.double()).float()


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return input * _sigmoid(input)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first * _sigmoid(second)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None or input.ndim == 2:
        return _line(input, weight, bias)
    # Of more axes than two it is a product and an addition.
    return _line(input, weight) + bias


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch translates it to ONNX, where nothing in it is quantized."""
    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype is torch.bool):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    root = torch.tensor(query.shape[-1] ** -0.5 if scale is None else scale, device=query.device).sqrt()
    scores = _matmul(query * root, key.transpose(-2, -1) * root)
    return _matmul(_softmax(scores if attn_mask is None else scores + attn_mask, -1), value)


_sigmoid, _line = rounded_once(torch.sigmoid), rounded_once(F.linear)
_norm = rounded_once(F.layer_norm)
_matmul, _softmax = rounded_once(torch.matmul), rounded_once(torch.softmax)
_IN_PLACE: dict[Any, str] = {
    torch.Tensor.sigmoid_: "sigmoid",
    torch.Tensor.tanh_: "tanh",
    torch.Tensor.exp_: "exp",
}
_IN_PLACE |= {torch.sigmoid_: "sigmoid", torch.tanh_: "tanh", torch.exp_: "exp"}
_SAME: tuple[Callable[..., Tensor], ...] = (
    torch.softmax, torch.Tensor.softmax, F.softmax,
    torch.log_softmax, torch.Tensor.log_softmax, F.log_softmax,
    torch.exp, torch.Tensor.exp, torch.einsum,
    torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid, torch.special.expit,
    torch.tanh, torch.Tensor.tanh, F.tanh,
    torch.matmul, torch.Tensor.matmul, torch.linalg.matmul,
    torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm,
)  # fmt: skip
_RULES: dict[Any, _Rule] = {
    **{func: rounded_once(func) for func in _SAME},
    **{func: rounded_once(getattr(torch, name)) for func, name in _IN_PLACE.items()},
    **dict.fromkeys((torch.erf, torch.Tensor.erf, torch.special.erf), _erf),
    **dict.fromkeys((torch.layer_norm, F.layer_norm), _layer_norm),
    F.gelu: _gelu,
    F.silu: _silu,
    F.glu: _glu,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
