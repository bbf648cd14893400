"""Tensors that share a decision: the user's groups, and those found in networks by one forward pass."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import dqss
from dqss.errors import SearchSpaceError
from dqss.lit.settings import PTQSettings
from dqss.prepare import prepare
from dqss.supernet import Supernet
from dqss.ties import find, tie
from search_spaces import uniform
from tests.support.nets import calibrated, cnn, images, small_space

ONE = uniform(8, 8, ["minmax", "mse"], ["minmax", "mse"], find_ties=["inputs", "residual"])


def of_timm(name: str, size: int) -> tuple[Supernet, torch.Tensor]:
    batch = torch.randn(1, 3, size, size)
    supernet = Supernet(prepare(timm.create_model(name).eval(), batch).model, ONE)
    supernet.calibrate([batch])
    return supernet, batch


def both(*layers: str) -> list[list[str]]:
    """Their weights, and their inputs."""
    return [[f"{layer}.{role}" for layer in layers] for role in ("weight", "activation")]


def as_sets(groups: list[list[str]]) -> set[frozenset[str]]:
    return {frozenset(group) for group in groups}


def test_resnet_18_ties_each_stage_and_both_ways_into_it() -> None:
    supernet, batch = of_timm("resnet18", 64)
    residual = both("conv1", "layer1.0.conv2", "layer1.1.conv2")
    for stage in (2, 3, 4):
        at = f"layer{stage}"
        residual += both(f"{at}.0.conv2", f"{at}.0.downsample.0", f"{at}.1.conv2")
    inputs = [[f"layer{k}.0.conv1.activation", f"layer{k}.0.downsample.0.activation"] for k in (2, 3, 4)]
    assert as_sets(find(supernet, batch, ONE.found_ties[1:])) == as_sets(residual)
    assert as_sets(find(supernet, batch, ONE.found_ties[:1])) == as_sets(inputs)


def test_mobilenet_v2_ties_what_each_resolution_adds_up() -> None:
    supernet, batch = of_timm("mobilenetv2_100", 32)
    wanted = []
    for stage, blocks in ((1, 2), (2, 3), (3, 4), (4, 3), (5, 3)):
        wanted += both(*(f"blocks.{stage}.{block}.conv_pwl" for block in range(blocks)))
    assert as_sets(find(supernet, batch, ONE.found_ties)) == as_sets(wanted)


def test_a_vit_has_one_residual_stream() -> None:
    supernet, batch = of_timm("vit_tiny_patch16_224", 224)
    writers = [f"blocks.{k}.{part}" for k in range(12) for part in ("attn.proj", "mlp.fc2")]
    assert as_sets(find(supernet, batch, ONE.found_ties)) == as_sets(both("patch_embed.proj", *writers))


class Attention(nn.Module):
    """Three layers read one tensor; one branch is scaled by another, which is no addition."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.query(x)) * self.key(x)
        whole = torch.cat([self.left(gate), self.right(self.value(x)).relu_()], -1)
        whole += 1.0
        return whole


def test_readers_of_one_tensor_and_parts_of_one_concatenation_are_tied_and_gates_are_not() -> None:
    supernet = calibrated(Attention(), images(5, 4), space=ONE)
    found = find(supernet, images(1, 4), ONE.found_ties)
    wanted = [["query.activation", "key.activation", "value.activation"], *both("left", "right")]
    assert as_sets(found) == as_sets(wanted)


def test_tied_tensors_share_logits_and_are_calibrated_each_for_itself() -> None:
    torch.manual_seed(0)
    supernet = calibrated(Attention(), images(50, 4), space=ONE)
    before = {name: layer.weight[0].scale.clone() for name, layer in supernet.layers.items() if layer.weight}
    tie(supernet, images(1, 4))
    decisions = supernet.decisions
    assert len(decisions) == 10 - 2 - 2
    assert supernet.layers["left"].weight.decision is supernet.layers["right"].weight.decision  # type: ignore[union-attr]
    assert supernet.layers["query"].weight.decision is not supernet.layers["key"].weight.decision  # type: ignore[union-attr]
    for name, layer in supernet.layers.items():
        assert torch.equal(layer.weight[0].scale, before[name])  # type: ignore[index]
    assert len(supernet.arch_parameters()) == len(decisions)
    with supernet.assign({name: 1 for name in decisions}):
        assert torch.isfinite(supernet(images(2, 4))).all()


def test_a_search_with_ties_makes_tied_choices_and_records_them() -> None:
    torch.manual_seed(1)
    space = small_space(
        [2, 4, 8], find_ties=["inputs"], ties=[["left.weight", "right.weight", "value.weight"]]
    )
    settings = PTQSettings(steps=4, discrete_every=0, finalists=1, batch_size=2)
    budget = dqss.Budget(average_weight_bits=4.5)
    result = dqss.search_ptq(Attention(), images(20, 4), space, settings, budget=budget)
    strategy = result.bundle.strategy
    wanted = [["left.weight", "right.weight", "value.weight"]]
    wanted += [["query.activation", "key.activation", "value.activation"]]
    assert as_sets(strategy.ties) == as_sets(wanted)
    chosen = {f"{name}.{role}": choice for name, role, choice in strategy.choices()}
    for group in strategy.ties:
        assert len({chosen[name].decision for name in group}) == 1
        assert len({chosen[name].candidate() for name in group}) == 1
    quantized, batch = result.quantized(), images(3, 4)
    with result.supernet.assign(result.discretized.assignments[result.discretized.exported]):
        torch.testing.assert_close(quantized(batch), result.supernet(batch))


@pytest.mark.parametrize(
    ("ties", "said"),
    [
        ([["0.weight", "9.weight"]], r"no tensor matches '9.weight' \(did you mean '6.weight'\?\)"),
        ([["0.weight", "0.activation"]], "'0.weight' and '0.activation' have not the same candidates"),
        (["0.weight"], "expected groups, each a list of patterns"),
    ],
)
def test_groups_that_make_no_sense_are_refused(ties: Any, said: str) -> None:
    with pytest.raises(SearchSpaceError, match=said):
        supernet = calibrated(cnn(), images(4), space=small_space(8, ties=ties))
        tie(supernet, images(1))


def test_an_unknown_kind_of_ties_is_refused() -> None:
    with pytest.raises(SearchSpaceError, match=r"'residuals' \(did you mean 'residual'\?\)"):
        small_space(8, find_ties=["residuals"])
