"""Blocks and layers that are reconstructed as one, and what they are fed with."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from dqss.errors import UserError
from dqss.layers import searchable_layers
from dqss.prepare import prepare
from dqss.repair.units import Unit, capturing, find_units
from tests.repair.support import Residual, network, pictures


def units_of(model: nn.Module, inputs: Tensor, *patterns: str) -> tuple[list[Unit], list[str]]:
    return find_units(model, list(searchable_layers(model)), patterns, inputs)


def test_repeated_blocks_and_the_layers_between_them() -> None:
    model = network()
    units, left = units_of(model, pictures(2), "auto")
    assert [unit.modules for unit in units] == [("stem", "act"), ("blocks.0",), ("blocks.1",), ("head",)]
    assert units[1].layers == ("blocks.0.conv1", "blocks.0.conv2")
    assert [unit.follows for unit in units] == [None, "stem", "blocks.0", None]
    assert left == []


def test_no_pattern_is_a_unit_a_layer() -> None:
    units, _ = units_of(network(), pictures(2))
    assert [unit.name for unit in units] == list(searchable_layers(network()))
    assert all(len(unit.layers) == 1 for unit in units)


def test_patterns_and_their_mistakes() -> None:
    units, _ = units_of(network(), pictures(2), "blocks")
    assert [unit.name for unit in units] == ["stem", "blocks", "head"]
    with pytest.raises(UserError, match=r"repair.blocks: no module .* matches 'block' \(did you mean"):
        units_of(network(), pictures(2), "block")


class Odd(nn.Module):
    """A layer that is called twice, one never, one by keyword, a block with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.keyword = (nn.Linear(4, 4) for _ in range(3))
        self.pair = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.keyword(input=self.twice(self.twice(x)))
        for pair in self.pair:
            x = pair(x, x)
        return x


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inside(x) + y


def test_what_does_not_map_a_tensor_to_a_tensor() -> None:
    units, left = units_of(Odd(), torch.randn(3, 4), "auto")
    assert [unit.name for unit in units] == ["pair.0.inside", "pair.1.inside"]
    assert left == ["twice", "never", "keyword"]
    with pytest.raises(UserError, match=r"'pair.0' does not map one tensor to one tensor"):
        units_of(Odd(), torch.randn(3, 4), "pair.0")


def captured(model: nn.Module, unit: Unit, inputs: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad(), capturing(model, unit, lambda x: seen.append(x.clone()), seen.append) as run:
        run(inputs)
    return seen[0], seen[1]


@pytest.mark.parametrize("name", ["mobilenetv2_035", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_unit_alone_gives_what_it_gives_inside(name: str) -> None:
    torch.manual_seed(0)
    options = {} if "mobilenet" in name else {"img_size": 56}
    model = timm.create_model(name, num_classes=5, **options).eval()
    inputs = torch.randn(2, 3, 56, 56)
    model = prepare(model, inputs).model
    units, _ = units_of(model, inputs, "auto")
    assert len({layer for unit in units for layer in unit.layers}) == sum(len(u.layers) for u in units)
    outputs: dict[str, Tensor] = {}
    for unit in units:
        given, made = captured(model, unit, inputs)
        with torch.no_grad():
            torch.testing.assert_close(unit.run(model, given.clone()), made, atol=1e-5, rtol=1e-4)
        if unit.follows is not None:
            assert torch.equal(given, outputs[unit.follows])
        outputs[unit.name] = made.clone()
    # The stem, with its activation, feeds the first block, and that one the next.
    if name == "mobilenetv2_035":
        assert sum(unit.follows is not None for unit in units) == len(units) - 2


def test_input_quantizers_do_not_touch_what_is_captured() -> None:
    model = copy.deepcopy(network())
    assert isinstance(model, Residual)
    model.stem.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    inputs = pictures(2)
    given, _ = captured(model, Unit(("stem", "act"), ("stem",)), inputs)
    assert torch.equal(given, inputs)


def test_the_caps_of_an_equalized_network_belong_to_the_layer_before_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    inputs = torch.randn(2, 3, 8, 8)
    found = prepare(model, inputs, optional=("equalize",))
    assert "equalize 0>1>2" in found.recipe
    units, _ = units_of(found.model, inputs)
    assert [unit.modules for unit in units] == [("0", "1"), ("2",)]
