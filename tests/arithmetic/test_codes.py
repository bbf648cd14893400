"""Sums of codes: digits stand for what they should, and every order of additions gives the same bits."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.apply import apply_strategy
from dqss.arithmetic import EXACT
from dqss.arithmetic.codes import CodeKernel, code_sum
from dqss.arithmetic.digits import digits_of
from dqss.arithmetic.halving import halved_mean, next_power
from dqss.arithmetic.sums import EXACT as LIMIT
from dqss.mixing import Grid
from dqss.spec import PerChannel, PerGroup, PerTensor, QuantSpec
from search_spaces import uniform
from tests.deploy.support import bundle_for
from tests.points.test_points import Network, Residual, batch


def codes_of(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("codes", "peak", "base", "count"),
    [
        (codes_of(-128, 127, 4, 500), 255, 1, 1),
        (codes_of(-128, 127, 4, 4600), 255, 16, 2),
        (codes_of(-128, 127, 4, 4), 2**14, 1, 1),
        (codes_of(-128, 127, 2, 20), 2**17 - 1, 4, 4),
        (torch.full((1, 4600), -128), 255, 16, 2),
        (torch.full((1, 4600), 127), 255, 4, 4),
        (codes_of(-255, 255, 3, 2000), 255, 16, 3),
        (torch.zeros(2, 3), 255, 1, 1),
    ],
)
def test_digits_are_the_fewest_whose_sums_are_exact(codes: Tensor, peak: int, base: int, count: int) -> None:
    digits = digits_of(codes, peak)
    assert digits is not None and (digits.base, len(digits.parts)) == (base, count)
    total = sum(part.long() * base ** (count - 1 - at) for at, part in enumerate(digits.parts))
    assert isinstance(total, Tensor) and torch.equal(total, codes.long())
    for part in digits.parts:
        assert int(part.abs().sum(1).max()) * peak < LIMIT


def test_what_no_digits_are_small_enough_for_has_none() -> None:
    assert digits_of(torch.full((1, 300), 3), 2**16) is None


GRIDS = {
    "symmetric": (QuantSpec(8, True, PerChannel(0)), 0.0),
    "narrow": (QuantSpec(3, True, PerTensor()), 0.0),
    "affine": (QuantSpec(8, False, PerChannel(0)), 77.0),
    "without a zero": (QuantSpec(4, True, PerChannel(0)), -0.5),
}
LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], list[int]]] = {
    "convolution": (F.conv2d, (6, 3, 3, 3), (2, 3, 8, 8), [2]),
    "depthwise": (F.conv2d, (6, 1, 3, 3), (2, 6, 8, 8), [1, 1, 1, 6]),
    "one axis": (F.conv1d, (6, 3, 3), (2, 3, 9), []),
    "linear": (F.linear, (6, 4000), (3, 4000), []),
    "tokens": (F.linear, (6, 30), (2, 5, 30), []),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_layer_is_its_exact_sum_scaled_and_moved(name: str, grid: str) -> None:
    func, shape, size, rest = LAYERS[name]
    spec, zero = GRIDS[grid]
    generator = torch.Generator().manual_seed(1)
    count = 1 if isinstance(spec.granularity, PerTensor) else shape[0]
    scale = torch.rand(count, generator=generator) * 0.01 + 0.001
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).double() - zero
    step = scale.reshape(-1, *[1] * (len(shape) - 1))
    weight = (codes.float() * step).reshape(shape)
    inputs = Grid(torch.tensor([0.0371]), torch.tensor([11.0]), QuantSpec(8, False))
    whole = torch.randint(-11, 245, size, generator=generator).double()
    bias = torch.randn(shape[0], generator=generator)
    total = code_sum(weight, Grid(scale, torch.full((count,), zero), spec), inputs)
    assert total is not None
    found = CodeKernel(total, inputs.scale, bias)(func, whole.float() * inputs.scale, *rest)
    # In fp64 the sum is exact too: a number of halves where codes have them.
    exact = func(whole, codes, None, *rest)
    axes = (-1,) if func is F.linear else (-1, *[1] * (len(shape) - 2))
    unit, moved = (inputs.scale * scale).reshape(axes if count > 1 else ()), bias.reshape(axes)
    assert torch.equal(found, exact.float() * unit + moved)


def test_what_has_no_exact_sum_is_left() -> None:
    weight, ones = torch.ones(2, 8), torch.ones(2)
    inputs = Grid(torch.ones(1), torch.zeros(1), QuantSpec(8, False))
    by_channel = QuantSpec(8, True, PerChannel(0))
    assert code_sum(weight, Grid(ones, 0 * ones, by_channel), inputs) is not None
    assert code_sum(weight, Grid(ones * 0.7, 0 * ones, by_channel), inputs) is None  # not on the grid
    assert code_sum(weight * 1e-39, Grid(ones * 1e-39, 0 * ones, by_channel), inputs) is None
    groups = QuantSpec(8, True, PerGroup(4, 0))
    assert code_sum(weight, Grid(torch.ones(4), torch.zeros(4), groups), inputs) is None
    columns = QuantSpec(8, True, PerChannel(1))
    assert code_sum(weight, Grid(torch.ones(8), torch.zeros(8), columns), inputs) is None
    channels = Grid(torch.ones(8), torch.zeros(8), QuantSpec(8, False, PerChannel(-1)))
    assert code_sum(weight, Grid(ones, 0 * ones, by_channel), channels) is None


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (5, 3), (8, 8)])
def test_halves_are_a_mean(size: tuple[int, int]) -> None:
    x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(halved_mean(x), x.double().mean((2, 3)).float(), atol=1e-6)
    assert next_power(size[0] * size[1]) == {1: 1, 4: 4, 49: 64, 15: 16, 64: 64}[size[0] * size[1]]


def test_the_order_of_an_average_is_the_stated_one() -> None:
    large = torch.tensor([1e8, 1.0, -1e8])
    assert float((large[0] + large[1]) + large[2]) == 0.0
    # Of three values the first and the third are added first.
    assert float(halved_mean(large.reshape(1, 1, 3))) == pytest.approx(1 / 3)


class Averages(nn.Module):
    """A global average in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Network(Residual()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body.stem(x)).mean((2, 3)))


def simulated(model: nn.Module, inputs: Tensor) -> nn.Module:
    bundle = bundle_for(model, inputs, uniform([4, 8], 8, ["mse"], ["minmax"], products=True))
    return apply_strategy(model, bundle, arithmetic=EXACT)


def test_the_simulation_does_not_depend_on_how_it_is_computed() -> None:
    torch.manual_seed(0)
    model, inputs = Averages().eval(), batch(8)
    network = simulated(model, inputs)
    wanted = network(inputs)
    assert torch.equal(torch.cat([network(x[None]) for x in inputs]), wanted)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(network(inputs), wanted)
    assert torch.equal(copy.deepcopy(network)(inputs), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(network))(inputs), wanted)
    assert type(network).__name__ == "Averages" and isinstance(network, Averages)
    assert sum(isinstance(module, CodeKernel) for module in network.modules()) == 2


@pytest.mark.gpu
def test_the_simulation_is_the_same_on_a_gpu() -> None:
    torch.manual_seed(0)
    model, inputs = Averages().eval(), batch(8)
    network = simulated(model, inputs)
    wanted = network(inputs)
    assert torch.equal(network.cuda()(inputs.cuda()).cpu(), wanted)
