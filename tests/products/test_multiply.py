"""Products of quantized operands are what torch computes from the same operands."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.choice import OPERANDS
from dqss.products.multiply import Product, as_product, attention

L, S = 5, 6


def product(func: Any, *args: Any, **kwargs: Any) -> Product:
    found = as_product(func, args, kwargs)
    assert found is not None
    return found


def as_it_is(name: str, value: Tensor) -> Tensor:
    return value


MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(L, S) > 0.4},
    "mask for each head": {"attn_mask": torch.rand(2, 4, L, S) > 0.4},
    "added mask": {"attn_mask": torch.randn(4, L, S)},
    "a row with nothing": {"attn_mask": torch.arange(L)[:, None].expand(L, S) > 0},
    "minus infinity": {"attn_mask": torch.full((L, S), -math.inf).triu(1)},
}


@pytest.mark.parametrize("options", list(MASKS.values()), ids=list(MASKS))
@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
def test_attention_is_torchs_own(options: dict[str, Any], heads: int) -> None:
    q, k, v = torch.randn(2, 4, L, 8), torch.randn(2, heads, S, 8), torch.randn(2, heads, S, 3)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = {**options, "enable_gqa": heads < 4}
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    found = attention(q, k, v, **options, quantize=as_it_is)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), direction),
        torch.autograd.grad(wanted, (q, k, v), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_keeps_its_type_and_loses_nothing(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, L, 8, dtype=dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    found = attention(q, k, v, is_causal=True, quantize=as_it_is)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


A, B, C = torch.randn(2, 3, 4), torch.randn(2, 4, 3), torch.randn(2, 3, 3)
CALLS: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.matmul, A, B),
    "method": (Tensor.matmul, A, B),
    "linalg": (torch.linalg.matmul, A, B),
    "bmm": (torch.bmm, A, B),
    "mm": (torch.mm, A[0], B[0]),
    "baddbmm": (torch.baddbmm, C, A, B),
    "addbmm": (torch.addbmm, C[0], A, B),
    "addmm": (torch.addmm, C[0], A[0], B[0]),
    "einsum": (torch.einsum, "bij,bjk->bki", A, B),
    "einsum of a list": (torch.einsum, "bij,bjk->bki", [A, B]),
}


@pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))
def test_both_operands_are_exchanged(call: tuple[Any, ...]) -> None:
    func, *args = call
    seen = []

    def double(name: str, value: Tensor) -> Tensor:
        seen.append(name)
        return 2 * value

    found = product(func, *args).quantized(double)
    alone = args[0] if func in (torch.baddbmm, torch.addbmm, torch.addmm) else 0
    torch.testing.assert_close(found - alone, 4 * (func(*args) - alone), rtol=1e-5, atol=1e-5)
    assert tuple(seen) == OPERANDS["matmul"]
    assert torch.equal(product(func, *args).plain(), func(*args))


def test_operands_given_by_keyword() -> None:
    def double(name: str, value: Tensor) -> Tensor:
        return 2 * value

    assert torch.equal(product(torch.matmul, input=A, other=B).quantized(double), 4 * (A @ B))
    assert torch.equal(
        product(torch.baddbmm, C, batch2=B, batch1=A, beta=0).quantized(double), 4 * torch.bmm(A, B)
    )
    q = torch.randn(2, L, 4)
    found = product(F.scaled_dot_product_attention, value=q, key=q, query=q)
    torch.testing.assert_close(
        found.quantized(as_it_is), F.scaled_dot_product_attention(q, q, q), rtol=1e-6, atol=1e-6
    )
    assert all(operand is q for operand in found.given)


def test_what_is_shown_and_what_is_no_product() -> None:
    seen: dict[str, Tensor] = {}
    q, k, v = torch.randn(3, 2, L, 4)
    product(F.scaled_dot_product_attention, q, k, v).show(seen.setdefault)
    assert set(seen) == set(OPERANDS["attention"])
    torch.testing.assert_close(seen["probabilities"], torch.softmax(q @ k.mT / 2, -1))
    assert as_product(torch.softmax, (A, -1), {}) is None
    assert as_product(F.linear, (A, B), {}) is None
    assert as_product(torch.einsum, ("ii", A[0, :, :3]), {}) is None
    assert as_product(torch.einsum, ("a,b,c->abc", A[0, 0], A[0, 0], A[0, 0]), {}) is None
    assert not product(torch.matmul, A.long(), B).of_real_tensors()
    assert not product(torch.matmul, A, B, out=torch.empty(0)).of_real_tensors()
    assert not product(torch.matmul, A[0].to_sparse(), B[0]).of_real_tensors()
    assert product(torch.matmul, A, B).of_real_tensors()
