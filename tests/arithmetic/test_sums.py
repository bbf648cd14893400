"""Sums of products are exact, whichever way they are computed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dqss.arithmetic.sums import HALF, PEAK, Largest, rounded_sum

WIDTHS = {"in fp32": 100, "in two halves": 4000, "in fp64": 20000}


@pytest.mark.parametrize("bias", [0, 77, 2**30])
@pytest.mark.parametrize("way", WIDTHS)
def test_the_worst_case(way: str, bias: int) -> None:
    # All codes at their ends, and one odd product: in a plain sum of fp32 it would get lost.
    x, w = torch.full((2, WIDTHS[way]), float(PEAK)), torch.full((3, WIDTHS[way]), -127, dtype=torch.int8)
    x[1, 0], w[1, 0] = 254.0, -126
    biases = torch.tensor([bias, -bias, 1], dtype=torch.float64)
    largest = Largest.of(w, biases)
    ways = {"in fp32": largest.fits(PEAK, 1), "in two halves": largest.fits(HALF, 1), "in fp64": True}
    assert next(name for name, fits in ways.items() if fits) == (way if bias < 100 else "in fp64")
    wanted = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T + biases.numpy().astype(np.int64)
    found = rounded_sum(F.linear, x, w, biases, 1, largest)
    assert np.array_equal(found.numpy(), wanted.astype(np.int32).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    inputs=st.sampled_from([2, 40, 600]),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
    shift=st.sampled_from([0, 0, 4, 6]),
    bias=st.sampled_from([0, 10**3, 10**6, 2**30]),
)
def test_convolutions(seed: int, inputs: int, padding: int, stride: int, shift: int, bias: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-PEAK, PEAK + 1, (2, inputs, 6, 5), generator=generator)
    end = 128 >> shift
    w = torch.randint(-end, end, (3, inputs, 3, 3), generator=generator).to(torch.int8)
    biases = torch.randint(-bias, bias + 1, (3, 1, 1), generator=generator).double()
    columns = F.unfold(x.double(), 3, padding=padding, stride=stride).numpy().astype(np.int64)
    wanted = np.einsum("ok,nkl->nol", w.numpy().reshape(3, -1).astype(np.int64), columns) << shift
    wanted = (wanted + biases.flatten(1).numpy().astype(np.int64)).astype(np.int32).astype(np.float32)
    # In whatever order.
    for order in (torch.arange(inputs), torch.randperm(inputs, generator=generator)):
        codes = w[:, order]
        found = rounded_sum(
            F.conv2d,
            x[:, order].float(),
            codes,
            biases,
            1 << shift,
            Largest.of(codes, biases),
            stride,
            padding,
        )
        assert np.array_equal(found.flatten(2).numpy(), wanted)
