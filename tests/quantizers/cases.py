"""Tensors and quantizers that learn, for all tests of them."""

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from dqss import quantizers
from dqss.errors import SearchSpaceError
from dqss.functional import channel_count, channel_view
from dqss.observers import HistogramAccumulator, Statistics
from dqss.quantizers import LearnedQuantizer
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec, Role

SCHEMES = ((True, True), (True, False), (False, True))
KINDS = ("normal", "positive", "constant", "zero", "outliers", "mixed")


def allowed() -> Iterator[tuple[str, Role, bool, bool]]:
    """Every algorithm on every tensor and grid that it takes: name, role, symmetric, signed."""
    for name in quantizers.learned_algorithms():
        for role in Role:
            for symmetric, signed in SCHEMES:
                try:
                    quantizers.check(Candidate.of(name, QuantSpec(4, symmetric, PerTensor(), signed)), role)
                except SearchSpaceError:
                    continue
                yield name, role, symmetric, signed


ALLOWED = tuple(allowed())


def tensor(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "positive":
        return x.relu()
    if kind == "constant":
        return torch.full(shape, float(x.flatten()[0]))
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "outliers":
        x.view(-1)[0] *= 1e4
    if kind == "mixed":  # channels of very different size, one of them empty
        x = x * torch.logspace(-6, 6, shape[0]).view(-1, *[1] * (x.ndim - 1))
        x[-1] = 0
    return x


def made(
    name: str,
    x: Tensor,
    role: Role = Role.WEIGHT,
    bits: int = 4,
    symmetric: bool = True,
    signed: bool = True,
    channels: bool = False,
    binned: bool = False,
) -> LearnedQuantizer:
    """Calibrated on ``x``, per tensor or with channels along axis 0 (weights) or 1."""
    granularity = PerChannel(0 if role is Role.WEIGHT else 1) if channels else PerTensor()
    spec = QuantSpec(bits, symmetric, granularity, signed)
    quantizer = quantizers.build(Candidate.of(name, spec), channel_count(x.shape, granularity), role)
    assert isinstance(quantizer, LearnedQuantizer)
    rows = channel_view(x, granularity)
    histogram = HistogramAccumulator(rows.shape[0], keep_batches=True)
    if binned:
        histogram.update(rows)
    quantizer.calibrate(histogram.statistics() if binned else Statistics.of(rows))
    return quantizer


@st.composite
def cases(draw: st.DrawFn) -> tuple[LearnedQuantizer, Tensor]:
    name, role, symmetric, signed = draw(st.sampled_from(ALLOWED))
    shape = draw(st.sampled_from([(1, 1), (3, 1), (2, 5), (3, 4, 5), (4, 3, 2, 2)]))
    x = tensor(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 100)))
    bits, channels = draw(st.integers(2, 8)), draw(st.booleans())
    return made(name, x, role, bits, symmetric, signed, channels, draw(st.booleans())), x
