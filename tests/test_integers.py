"""Products of codes against the floats that they stand for."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dqss import fused, integers
from dqss.decision import Relaxation, Sampled, Softmax, StraightThroughGumbel
from dqss.recompute import recomputing
from dqss.space import SearchSpace
from dqss.supernet import Supernet
from search_spaces import uniform

pytestmark = pytest.mark.skipif(not integers.available(), reason="this CPU has no instructions for bytes")

WEIGHTS = ("minmax", {"name": "percentile", "p": 90.0}, "mse")
INPUTS = ("minmax", {"name": "percentile", "p": 80.0}, "aciq_gaussian")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POSITIONS", "DEPTH", "PRODUCTS", "TURNED"):
        monkeypatch.setattr(integers, name, 1)
    monkeypatch.setattr(fused, "SMALL", 1)


def supernet(
    model: nn.Module, x: Tensor, space: SearchSpace, relaxation: Relaxation | None = None
) -> Supernet:
    found = Supernet(copy.deepcopy(model), space)
    found.calibrate([x])
    found.relax(relaxation or Sampled())
    found.draw(0, 0)
    return found


def integer_layers(searched: Supernet) -> list[integers.IntegerLayer]:
    layers = searched.layers.values()
    found = [layer.activation.bypass for layer in layers if layer.activation is not None]
    return [layer for layer in found if isinstance(layer, integers.IntegerLayer)]


def passes(searched: Supernet, x: Tensor, integer: bool) -> list[Tensor]:
    """Output, and gradients of the input and of all logits, with products of codes or without."""
    taken = integer_layers(searched)
    for layer in taken:
        layer.activation.bypass = layer if integer else None
    leaf = x.clone().requires_grad_()
    with searched.mode("relaxed"):
        if integer:
            assert taken
            assert taken[0].applies(leaf)
        output = searched(leaf)
    torch.manual_seed(7)
    (output * torch.randn_like(output)).sum().backward()
    found = [output.detach(), leaf.grad]
    for parameter in searched.arch_parameters():
        found.append(parameter.grad)
        parameter.grad = None
    for layer in taken:
        layer.activation.bypass = layer
    return [part for part in found if part is not None]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To the rounding of fp32, against the largest value of each."""
    assert len(found) == len(wanted)
    for got, expected in zip(found, wanted, strict=True):
        scale = max(float(expected.abs().max()), 1e-6)
        torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5)


@settings(max_examples=12)
@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
    st.booleans(),
    st.tuples(st.integers(2, 8), st.integers(2, 8)),
    st.booleans(),
    st.integers(0, 3),
)
def test_convolutions_are_those_of_floats(
    channels: int,
    out: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
    bias: bool,
    bits: tuple[int, int],
    positive: bool,
    step: int,
) -> None:
    torch.manual_seed(step)
    layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=bias)
    x = torch.randn(2, channels, 10, 11) + 0.3
    check(nn.Sequential(layer), x.relu() if positive else x, bits, step)


@settings(max_examples=6)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 20),
    st.booleans(),
    st.tuples(st.integers(2, 8), st.integers(2, 8)),
    st.integers(0, 3),
)
def test_linear_layers_are_those_of_floats(
    shape: list[int], inputs: int, out: int, bias: bool, bits: tuple[int, int], step: int
) -> None:
    torch.manual_seed(step)
    check(nn.Sequential(nn.Linear(inputs, out, bias=bias)), torch.randn(*shape, inputs) - 0.2, bits, step)


def check(model: nn.Module, x: Tensor, bits: tuple[int, int], step: int) -> None:
    searched = supernet(model, x, uniform(*bits, WEIGHTS, INPUTS))
    searched.draw(1, step)
    assert_close(passes(searched, x, True), passes(searched, x, False))


def test_the_sum_is_exact_where_that_of_floats_is_not() -> None:
    """Against the sum of the chosen quantizations in fp64: off by roundings of the result alone."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4000, 3)), torch.rand(20, 4000) * 5
    searched = supernet(model, x, uniform(8, 8, ("minmax",), ("minmax",)))
    (output, *_) = passes(searched, x, True)
    weight, activation = searched.layers["0"].weight, searched.layers["0"].activation
    assert weight is not None and activation is not None
    made = activation[0](x).double() @ weight.stack.choose(0).double().T + model[0].bias.double()
    terms = activation[0](x).double().abs() @ weight.stack.choose(0).double().abs().T
    errors = [((found.double() - made).abs() / terms).max() for found in passes(searched, x, False)[:1]]
    own = ((output.double() - made).abs() / terms).max()
    assert own < 1e-7
    assert own <= errors[0]


@pytest.mark.parametrize("relaxation", [Sampled(), StraightThroughGumbel(0.7)], ids=["sampled", "gumbel"])
def test_a_network_as_a_whole(relaxation: Relaxation) -> None:
    """In-place functions, layers in other layouts, a layer called twice, weights that two layers share."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.again = nn.Conv2d(8, 8, 1)
            self.rows, self.tied = nn.Linear(36, 36), nn.Linear(36, 36)
            self.tied.weight = self.rows.weight
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.first(x.contiguous(memory_format=torch.channels_last)))
            x = self.act(self.again(self.act(self.again(x))))
            return self.tied(self.act(self.rows(x.view(len(x), 8, 36))))

    x = torch.randn(4, 3, 12, 12)
    searched = supernet(Network(), x, uniform(8, 8, WEIGHTS, INPUTS), relaxation)
    assert len(integer_layers(searched)) == 4
    # Seldom does a value round to the other side; in a network as small as this one it does not.
    assert_close(passes(searched, x, True), passes(searched, x, False))


def test_activations_computed_anew_are_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)), nn.Flatten())
    x = torch.randn(2, 3, 9, 9)
    searched = supernet(model, x, uniform(8, 8, WEIGHTS, INPUTS))
    wanted = passes(searched, x, True)
    with recomputing(searched, ["0"]):
        found = passes(searched, x, True)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_copies_have_quantizers_of_their_own() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    searched = supernet(model, x, uniform(8, 8, WEIGHTS, INPUTS))
    copied = copy.deepcopy(searched)
    (layer,) = integer_layers(copied)
    assert layer.activation is copied.model[0].input_quantizer
    assert layer.weight is copied.model[0].parametrizations.weight[0]
    assert_close(passes(copied, x, True), passes(searched, x, True))
    assert all(parameter.grad is None for parameter in searched.arch_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(3, 6)
    searched = supernet(model, x, uniform(8, 8, WEIGHTS, INPUTS))
    x[1, 2] = value
    assert passes(searched, x, True)[0].isnan().any()


CONV, IMAGE = nn.Conv2d(4, 4, 3, padding=1), (2, 4, 5, 5)


@pytest.mark.parametrize(
    ("layer", "shape", "space"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), IMAGE, uniform(8, 8, WEIGHTS, INPUTS)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE, uniform(8, 8, WEIGHTS, INPUTS)),
        (nn.ConvTranspose2d(4, 4, 3), IMAGE, uniform(8, 8, WEIGHTS, INPUTS)),
        (nn.Conv1d(4, 4, 3), IMAGE[:3], uniform(8, 8, WEIGHTS, INPUTS)),
        (CONV, IMAGE[1:], uniform(8, 8, WEIGHTS, INPUTS)),
        (CONV, IMAGE, uniform(8, 9, WEIGHTS, INPUTS)),
        (CONV, IMAGE, uniform(9, 8, WEIGHTS, INPUTS)),
        (CONV, IMAGE, uniform(8, 8, WEIGHTS, INPUTS, activation_granularity="channel")),
    ],
    ids=["groups", "reflect", "transposed", "1d", "unbatched", "nine", "nine weights", "channels"],
)
def test_what_cannot_be_multiplied_so_is_left_alone(
    layer: nn.Module, shape: tuple[int, ...], space: SearchSpace
) -> None:
    x = torch.randn(*shape)
    searched = supernet(nn.Sequential(layer), x, space)
    with searched.mode("relaxed"):
        assert not any(layer.applies(x) for layer in integer_layers(searched))
        searched(x).sum().backward()


def test_only_steps_of_a_search_are_concerned() -> None:
    model, x = nn.Sequential(CONV), torch.randn(*IMAGE)
    searched = supernet(model, x, uniform(8, 8, WEIGHTS, INPUTS))
    (layer,) = integer_layers(searched)
    with searched.mode("relaxed"):
        assert layer.applies(x)
        with torch.no_grad():
            assert not layer.applies(x)
        with fused.fused(False):
            assert not layer.applies(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not layer.applies(x)
        assert not layer.applies(x.bfloat16())
    assert not layer.applies(x)
    with searched.pinned(searched.argmax()):
        assert not layer.applies(x)
    with searched.assign(searched.argmax()):
        assert not layer.applies(x)
    searched.relax(Softmax())
    with searched.mode("relaxed"):
        assert not layer.applies(x)


def test_small_layers_stay_with_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-20's in batches of eight: what is known of such networks was found with floats."""
    monkeypatch.undo()
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        x = torch.randn(8, channels, size, size)
        searched = supernet(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), x, uniform(8, 8))
        with searched.mode("relaxed"):
            assert not any(layer.applies(x) for layer in integer_layers(searched))


def test_sizes_are_those_of_the_output() -> None:
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)):
        layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation)
        x = torch.randn(2, 2, 9, 10)
        way = integers.Windows((stride,) * 2, (padding,) * 2, (dilation,) * 2, False)
        wanted = layer(x)[:, 0].numel(), layer.weight[0].numel()
        assert way.sizes(x.shape, layer.weight.shape) == wanted
