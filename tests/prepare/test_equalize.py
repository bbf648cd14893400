"""Equalized networks give the float network's output, and meeting weights are of one size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.errors import StrategyError
from dqss.prepare import prepare
from dqss.prepare.equalize import ChannelCaps, by_input, scaled_by_input
from tests.support.nets import images, output


def equalized(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, list[str], list[str]]:
    found = prepare(model, inputs, optional=("equalize",))
    words = next((entry.split(" ")[1:] for entry in found.recipe if entry.startswith("equalize ")), [])
    return found.model, words, found.notes


def error(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted = output(model, inputs)
        return float((output(other, inputs) - wanted).abs().max() / wanted.abs().max())


class Chained(nn.Module):
    """Functional and module activations, a pool, groups, a shortcut that ends a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.conv4 = nn.Conv2d(6, 6, 1)
        self.conv5 = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2)))
        x = F.leaky_relu(self.conv3(x), 0.1)
        x = x + self.conv4(x)  # read twice: conv3 is in no chain with conv4
        x = F.gelu(self.conv5(x))
        return self.last(F.relu(self.head(x.mean((2, 3)))))


def uneven(model: nn.Module, seed: int = 0, spread: float = 1.5) -> nn.Module:
    """Channels of different sizes, as in networks that need this; deep ones bear less of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                sizes = torch.exp(spread * torch.randn(len(module.weight), generator=generator))
                module.weight.mul_(sizes.reshape(-1, *[1] * (module.weight.ndim - 1)))
    return model.eval()


def test_chains_are_found_without_looking_at_code_and_the_network_stays() -> None:
    torch.manual_seed(0)
    model, inputs = uneven(Chained()), images(4, 3, 10, 10)
    found, words, notes = equalized(model, inputs)
    assert words == ["conv1>conv2", "conv2>conv3", "head>last"]
    assert error(model, found, images(6, 3, 10, 10)) < 1e-5
    assert any("alone in no chain: conv3, conv4, conv5, last" in note for note in notes)
    # Both sides of each channel are of one size, which they were far from.
    for first, second, groups in (("conv1", "conv2", 4), ("conv2", "conv3", 1), ("head", "last", 1)):
        ranges = []
        for network in (model, found):
            one, other = (network.get_submodule(name).weight.detach() for name in (first, second))
            ratio = one.flatten(1).abs().amax(1) / by_input(other, groups).abs().amax(1)
            ranges.append(float(ratio.log().abs().max()))
        assert ranges[0] > 1 and ranges[1] < 0.01


def test_by_input_is_what_reads_a_channel() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    x, factor = torch.randn(1, 6, 5, 5), torch.rand(6) + 0.5
    with torch.no_grad():
        wanted = conv(x * factor.reshape(1, 6, 1, 1))
        conv.weight.copy_(scaled_by_input(conv.weight, 2, factor))
        torch.testing.assert_close(conv(x), wanted)
        for channel in range(6):
            one = torch.zeros(1, 6, 3, 3)
            one[0, channel] = 1
            size = conv(one).abs().sum() > 0
            assert bool(size) == bool(by_input(conv.weight, 2)[channel].abs().sum() > 0)
    assert by_input(conv.weight, 2).shape == (6, 2 * 9)


def test_relu6_gets_a_cap_a_channel_and_a_functional_one_is_left() -> None:
    class Capped(nn.Module):
        def __init__(self, functional: bool) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.ReLU6(inplace=True)
            self.functional = functional

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.two(F.relu6(x) if self.functional else self.act(x)).mean((2, 3))

    torch.manual_seed(0)
    inputs = 20 * images(4, 3, 8, 8)
    for functional, wanted in ((False, ["one>act>two"]), (True, [])):
        model = uneven(Capped(functional))
        found, words, _ = equalized(model, inputs)
        assert words == wanted
        assert error(model, found, 20 * images(4, 3, 8, 8)) < 1e-5
        if wanted:
            caps = found.get_submodule("act")
            assert isinstance(caps, ChannelCaps) and caps.cap.max() / caps.cap.min() > 3
            with torch.no_grad():  # the cap was at work
                assert (model.one(inputs) > 6).float().mean() > 0.02


def test_the_recipe_repeats_it_to_the_bit() -> None:
    torch.manual_seed(0)
    model = uneven(timm.create_model("mobilenetv2_035", num_classes=5), spread=0.25)
    first = prepare(model, images(2, 3, 64, 64), optional=("equalize",))
    again = prepare(model, images(1, 3, 64, 64), recipe=first.recipe)
    one, other = first.model.state_dict(), again.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        inputs = images(2, 3, 64, 64)
        assert torch.equal(first.model(inputs), again.model(inputs))
    with pytest.raises(StrategyError, match="equalizes 'conv_stem>nothing'"):
        prepare(model, images(1, 3, 64, 64), recipe=["equalize conv_stem>nothing"])


def test_it_is_made_only_where_it_is_asked_for() -> None:
    model = uneven(Chained())
    assert prepare(model, images(2, 3, 10, 10)).recipe == []


FAMILIES = [
    "resnet18",
    "resnet26",
    "mobilenetv2_035",
    "mnasnet_small",
    "tf_efficientnet_lite0",
    "regnetx_002",
    "repvgg_a0",
    "mobilenetv1_100",
    "dla46_c",
    "hardcorenas_a",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_families_stay_what_they_are(name: str) -> None:
    torch.manual_seed(0)
    model = uneven(timm.create_model(name, num_classes=7), spread=0.25)
    inputs = images(2, 3, 64, 64)
    plain = prepare(model, inputs).model
    found, words, _ = equalized(model, inputs)
    assert words, "no chain at all"
    assert error(plain, found, images(2, 3, 64, 64)) < 1e-4
