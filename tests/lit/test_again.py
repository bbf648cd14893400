"""Activations searched again around tuned weights: what stays, what changes, what it is measured against."""

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqss
from dqss.apply import with_weights
from dqss.bundle import Bundle
from dqss.discretize import RefineSettings
from dqss.errors import UserError
from dqss.lit.again import same_bits, search_activations, with_activations
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import KLDivergence
from dqss.progress import Reporter
from dqss.repair import RepairSettings, repair_strategy
from dqss.samples import Samples
from search_spaces import uniform
from tests.repair.support import FAST, network, pictures, strategy_for

WORST = {"name": "percentile", "p": 60.0}
"""Clips so much that it can be told from any other candidate."""
SPACE = uniform([3, 4], [3, 8], ["minmax", "mse"], [WORST, "minmax", "mse"])
SETTINGS = PTQSettings(
    steps=24, batch_size=8, refine=RefineSettings(passes=4), discrete_every=0, screen_first=True
)


@cache
def clipped() -> Bundle:
    """Tuned weights of five bits, and activations of eight that are clipped badly."""
    space = uniform(5, 8, ["minmax"], [WORST])
    result = search_ptq(network(), pictures(), space, PTQSettings(steps=1, refine=RefineSettings(passes=0)))
    settings = RepairSettings(**FAST, blocks=(), drop=0.0, float_inputs=0.0)
    return repair_strategy(network(), result.bundle, pictures(), settings).bundle


def again(bundle: Bundle, folder: Path | None = None, said: list[str] | None = None) -> Bundle:
    class Says(Reporter):
        def say(self, text: str) -> None:
            if said is not None:
                said.append(text)

    samples, place = Samples.of(pictures()), torch.device("cpu")
    given: tuple[Any, ...] = (samples, SPACE, SETTINGS, Says(), {"accelerator": "cpu"})
    return search_activations(network(), bundle, *given, seed=0, folder=folder, device=place)


def distance(bundle: Bundle) -> float:
    """To the float network, on all inputs."""
    with torch.no_grad():
        return float(
            KLDivergence()(dqss.apply_strategy(network(), bundle)(pictures()), network()(pictures()))
        )


def test_weights_bits_and_what_was_tuned_stay() -> None:
    before = clipped()
    after = again(before)
    assert distance(after) < 0.7 * distance(before)
    for name, layer in before.strategy.layers.items():
        other = after.strategy.layers[name]
        assert other.weight == layer.weight and other.weight.tuned  # type: ignore[union-attr]
        assert other.activation.bits == 8  # type: ignore[union-attr]
    assert after.strategy.layers["stem"].activation.algorithm != "percentile"  # type: ignore[union-attr]
    kept = [key for key in before.tensors if ".activation." not in key]
    assert any(key.endswith(".weight.codes") for key in kept)
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in kept)
    assert after.strategy.repair == before.strategy.repair


def test_the_weights_alone_are_quantized() -> None:
    bundle = clipped()
    layers = dict(with_weights(network(), bundle).named_modules())
    whole = dict(dqss.apply_strategy(network(), bundle).named_modules())
    originals = dict(network().named_modules())
    for name in bundle.strategy.layers:
        assert torch.equal(layers[name].weight, whole[name].weight)  # type: ignore[arg-type]
        assert layers[name].weight.unique().numel() < originals[name].weight.unique().numel()  # type: ignore[union-attr, operator]
        assert not layers[name]._forward_pre_hooks


def test_it_is_the_float_network_that_distances_are_taken_to() -> None:
    """Of all strategies the best one by hand: to the network with tuned weights another one may be best."""
    bundle = clipped()
    said: list[str] = []
    after = again(bundle, said=said)
    found = float(said[-1].split(" -> ")[1].split(",")[0])
    parts = dqss.samples.split(len(pictures()), SETTINGS.parts, 0)
    with torch.no_grad():
        run, exact = dqss.apply_strategy(network(), after), network()
        each = [float(KLDivergence()(run(pictures()[part]), exact(pictures()[part]))) for part in parts]
    assert found == pytest.approx(sum(each) / 2, abs=6e-6)  # as it was said, in five places


def test_what_is_no_better_is_left() -> None:
    best = strategy_for(network(), pictures(), weight_bits=3, bits=8)
    best = again(best)
    same = again(best)  # the second time around there is nothing left to gain
    assert distance(same) <= distance(best) * (1 + 1e-6)


def test_rules_name_each_tensor_literally() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"a[1]": nn.Linear(4, 4), "a1": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["a1"](self.layers["a[1]"](x))

    inputs = torch.randn(16, 4)
    space = uniform(8, [4, 8], ["minmax"], ["minmax", "mse"])
    (rule,) = space.rules
    narrow = replace(rule, activation=rule.activation[:1], names=("*[[]1[]]",))
    assert narrow.activation[0].spec.bits == 4
    mixed = replace(space, rules=(narrow, replace(rule, activation=rule.activation[-1:])))
    bundle = search_ptq(Odd().eval(), inputs, mixed, PTQSettings(steps=1)).bundle
    layers = bundle.strategy.layers
    assert [layer.activation.bits for layer in layers.values()] == [4, 8]  # type: ignore[union-attr]
    narrowed = same_bits(space, bundle, Odd())
    for name, layer in layers.items():
        info = dqss.space.LayerInfo(name, ("Linear", "Module"), 0, -1)
        found = narrowed.candidates(info)
        assert found is not None and not found.weight
        assert {c.spec.bits for c in found.activation} == {layer.activation.bits}  # type: ignore[union-attr]
        assert {c.algorithm for c in found.activation} == {"minmax", "mse"}


def test_another_strategys_activations() -> None:
    one, other = (strategy_for(network(), pictures(), weight_bits=4, bits=bits) for bits in (8, 4))
    merged = with_activations(one, other)
    for name, layer in merged.strategy.layers.items():
        assert layer.weight == one.strategy.layers[name].weight
        assert layer.activation == other.strategy.layers[name].activation
    roles = {"weight": one, "activation": other}
    for key, (role, source) in itertools.product(merged.tensors, roles.items()):
        if f".{role}." in key:
            assert torch.equal(merged.tensors[key], source.tensors[key])


def test_a_whole_search_with_it(tmp_path: Path) -> None:
    repair = RepairSettings(**FAST)
    settings = PTQSettings(steps=6, refine=RefineSettings(passes=1), repair=repair, search_again=True)
    first = search_ptq(network(), pictures(), SPACE, settings, run_dir=tmp_path / "a")
    assert first.metrics["seconds"]["search_again"] > 0
    assert (tmp_path / "a" / "again" / "measured.jsonl").exists()
    # Once more in the same folder: nothing is searched, and the same comes out.
    second = search_ptq(network(), pictures(), SPACE, settings, run_dir=tmp_path / "a")
    assert second.bundle.tensors.keys() == first.bundle.tensors.keys()
    assert all(torch.equal(second.bundle.tensors[k], t) for k, t in first.bundle.tensors.items())


@pytest.mark.parametrize(
    ("repair", "words"),
    [
        (None, r"choose repair@method\.repair=layers"),
        (RepairSettings(learn_steps=True), r"learn_steps=true: .* choose one"),
    ],
)
def test_what_cannot_be(repair: RepairSettings | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        PTQSettings(repair=repair, search_again=True)


def test_a_candidate_that_is_not_there_any_more() -> None:
    """Bits that the space has no candidate with: those activations stay."""
    bundle = clipped()
    assert not same_bits(uniform(3, 4, ["minmax"], ["minmax"]), bundle, network()).rules
