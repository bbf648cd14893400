"""Smoothed networks give the float network's output; groups are all that must be scaled together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.errors import StrategyError
from dqss.models.rlfn import RLFN
from dqss.prepare import prepare, smooth
from dqss.prepare.groups import Group
from dqss.prepare.smooth import Smoothing
from dqss.prepare.work import Work
from tests.support.nets import images, output


@pytest.fixture
def every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups are smoothed, whether they gain or not."""
    monkeypatch.setattr(smooth, "_gains", lambda work, found, before: True)
    monkeypatch.setattr(smooth, "WORTH", -1.0)


def smoothed(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, list[str], list[str]]:
    found = prepare(model, inputs, optional=("smooth",))
    words = next((entry.split(" ")[1:] for entry in found.recipe if entry.startswith("smooth ")), [])
    return found.model, [word.partition(":")[0] for word in words], found.notes


def error(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted = output(model, inputs)
        return float((output(other, inputs) - wanted).abs().max() / wanted.abs().max())


class Mixed(nn.Module):
    """A shortcut, a gate, groups, resizing, an end in a linear layer; and what scales through nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.two = nn.Conv2d(6, 6, 1, bias=False)
        self.gate = nn.Conv2d(6, 6, 1)
        self.three = nn.Conv2d(6, 5, 1)
        self.four = nn.Conv2d(5, 5, 1)
        self.head = nn.Linear(5, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.two(F.leaky_relu(self.one(x), 0.1, inplace=True))
        x = x * torch.sigmoid(self.gate(x))
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        x = self.four(F.gelu(self.three(x)) + 1)
        return self.last(F.leaky_relu(self.head(x.mean((2, 3)))))


def names(word: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(part.split("+")) for part in word.split(">"))


GROUPS = {"one>two", "stem+two>one+gate+three", "head>last"}


@pytest.mark.usefixtures("every_group")
def test_groups_are_found_without_looking_at_code_and_the_network_stays() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        for layer in (model.stem, model.one, model.two, model.head):
            layer.weight.mul_(
                torch.exp(torch.randn(len(layer.weight))).reshape(-1, *[1] * (layer.weight.ndim - 1))
            )
    found, groups, notes = smoothed(model, images(4, 3, 12, 12))
    assert {names(word) for word in groups} == {names(word) for word in GROUPS}
    assert error(model, found, images(6, 3, 12, 12)) < 1e-5
    assert not torch.equal(found.get_submodule("stem").weight, model.stem.weight)
    assert any("layers' alone: gate, three, four, last" in note for note in notes)


def quantized(model: nn.Module, inputs: Tensor, bits: int) -> float:
    """Squared error where every layer's input is rounded to one step that covers its range, and no weight."""

    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        x = args[0]
        step = (x.max() - x.min()) / (2**bits - 1)
        return torch.round(x / step) * step

    with torch.no_grad():
        wanted = output(model, inputs)
        handles = [m.register_forward_pre_hook(rounding) for m in model.modules() if isinstance(m, nn.Conv2d)]
        found = output(model, inputs)
    for handle in handles:
        handle.remove()
    return float((found - wanted).square().mean())


def test_uneven_channels_lose_less_afterwards_and_floats_are_left() -> None:
    torch.manual_seed(0)
    even = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    uneven = copy.deepcopy(even)
    with torch.no_grad():  # the same function, channels of the first in ranges of their own
        sizes = torch.tensor([1.0, 1, 2, 4, 8, 16, 32, 64])
        uneven[0].weight.mul_(sizes.reshape(-1, 1, 1, 1))
        uneven[0].bias.mul_(sizes)
        uneven[2].weight.div_(sizes.reshape(1, -1, 1, 1))
    inputs, others = images(8, 3, 16, 16), images(8, 3, 16, 16)
    found, groups, _ = smoothed(uneven.eval(), inputs)
    assert "0>2" in groups
    assert quantized(found, others, 6) < 0.2 * quantized(uneven, others, 6)
    # Nothing is quantized: nothing is lost that factors could bring back.
    assert prepare(uneven, inputs, optional=("smooth",), bits=lambda name: (None, None)).recipe == []


def test_a_group_that_gains_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    inputs = images(8, 3, 16, 16)

    def worst(work: Work, group: Group, errors: object) -> Smoothing:
        return Smoothing(group.made, group.read, (-12, 12) * 4)

    monkeypatch.setattr(smooth, "_best", worst)
    assert smoothed(model, inputs)[1] == []
    monkeypatch.setattr(smooth, "_gains", lambda work, found, before: True)
    assert smoothed(model, inputs)[1] == ["0>2"]


@pytest.mark.usefixtures("every_group")
def test_every_layer_of_rlfn_but_the_gates_and_the_last_is_in_a_group() -> None:
    torch.manual_seed(0)
    model = RLFN(2, channels=6, blocks=2).eval()
    inputs = 255 * torch.rand(2, 3, 24, 24)
    found, groups, _ = smoothed(model, inputs)
    makers = {name for word in groups for name in word.partition(">")[0].split("+")}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert layers - makers == {"block_1.esa.conv4", "block_2.esa.conv4", "upsampler.0"}
    readers = {name for word in groups for name in word.partition(">")[2].split("+")}
    assert layers - readers == {"conv_1"}
    assert error(model, found, 255 * torch.rand(2, 3, 30, 40)) < 1e-5


@pytest.mark.usefixtures("every_group")
def test_the_recipe_repeats_it_to_the_bit_whatever_the_batch() -> None:
    torch.manual_seed(0)
    model = RLFN(2, channels=6, blocks=1).eval()
    first = prepare(model, 255 * torch.rand(3, 3, 24, 24), optional=("smooth",))
    again = prepare(model, torch.rand(1, 3, 24, 24), recipe=first.recipe)
    one, other = first.model.state_dict(), again.model.state_dict()
    assert first.recipe and all(torch.equal(one[key], other[key]) for key in one)
    for word in ("conv_1>nothing:0", "conv_1>conv_2:0,1", "conv_1:0", "conv_1>conv_2:a,b,c,d,e,f"):
        with pytest.raises(StrategyError, match="it smooths 'conv_1"):
            prepare(model, torch.rand(1, 3, 24, 24), recipe=[f"smooth {word}"])


@pytest.mark.usefixtures("every_group")
@pytest.mark.parametrize("kind", ["twice", "shared", "product", "shifted", "output", "narrow"])
def test_what_no_factor_goes_through_is_left(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            if kind == "shared":
                self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> object:
            y = self.one(x)
            if kind == "twice":
                return self.two(self.two(y))
            if kind == "product":
                return self.two(y * y)
            if kind == "shifted":
                return self.two(y + 1)
            if kind == "narrow":
                return self.two(y * torch.ones(2, 4, 1, 1) + y[:, :1])
            return self.two(y) if kind != "output" else (y, self.two(y))

    torch.manual_seed(0)
    assert prepare(Odd().eval(), images(2, 4, 5, 5), optional=("smooth",)).recipe == []


def test_it_is_made_only_where_it_is_asked_for() -> None:
    assert prepare(Mixed().eval(), images(2, 3, 12, 12)).recipe == []
