"""The whole network tuned at once: its codes, its loss, its judge, and the same after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy, prepared_network, weight_codes
from dqss.bundle import Bundle
from dqss.choice import TensorChoice
from dqss.errors import UserError
from dqss.mixing import Codes, Grid
from dqss.progress import Interrupted, Reporter
from dqss.randomness import generator_for
from dqss.repair import RepairSettings, repair_strategy
from dqss.repair import network as network_module
from dqss.repair.blending import blend, can_blend
from dqss.repair.repair import _Work
from dqss.repair.straight import StraightRounding
from dqss.spec import PerChannel, QuantSpec
from tests.repair.support import network, pictures, strategy_for


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def bundle(model: nn.Module) -> Bundle:
    """With layers that were tuned one by one."""
    plain = strategy_for(model, pictures())
    options = RepairSettings(blocks=(), iterations=40, batch_size=16, learning_rate=0.05, drop=0.0)
    return repair_strategy(model, plain, pictures(), options).bundle


def together(**options: Any) -> RepairSettings:
    # Rates that move something in few iterations.
    usual = {"network_learning_rate": 0.02, "network_step_learning_rate": 0.003, "batch_size": 16}
    return RepairSettings(**{"iterations": 0, "network_iterations": 40, **usual, **options})


def divergence(model: nn.Module, bundle: Bundle, inputs: Tensor) -> float:
    """KL in nats, by torch's own function."""
    with torch.no_grad():
        wanted, found = (
            torch.log_softmax(each(inputs.clone()), 1) for each in (model, apply_strategy(model, bundle))
        )
    return float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))


def test_it_comes_nearer_on_inputs_that_nothing_learned_from(model: nn.Module, bundle: Bundle) -> None:
    repaired = repair_strategy(model, bundle, pictures(), together(network_iterations=120))
    record: Any = repaired.bundle.strategy.repair
    before, after = record["network"]["held_out"]
    assert repaired.network is not None and repaired.network.held_out == (before, after)
    assert record["network"]["kept"] and after < before and 0 < record["network"]["changed"] < 0.5
    others = pictures(64, seed=99)
    assert divergence(model, repaired.bundle, others) < 0.9 * divergence(model, bundle, others)


def test_codes_stay_beside_the_weight_and_choices_stay(model: nn.Module, bundle: Bundle) -> None:
    found = repair_strategy(model, bundle, pictures(), together()).bundle
    exact = prepared_network(model, bundle)
    turned = 0
    for name, layer in found.strategy.layers.items():
        weight: Any = exact.get_submodule(name).weight
        codes, earlier = (weight_codes(one, name, weight) for one in (found, bundle))
        scale, zero_point = codes.grid.shaped(weight.shape)
        spec = codes.grid.spec
        floor = torch.floor(weight.detach() / scale) + zero_point
        low, high = (edge.clamp(spec.qmin, spec.qmax) for edge in (floor, floor + 1))
        integers = codes.integers.float()
        assert ((integers == low) | (integers == high)).all(), name
        assert torch.equal(codes.grid.scale, earlier.grid.scale)
        turned += int((codes.integers != earlier.integers).sum())
        was = bundle.strategy.layers[name]
        for now, before in ((layer.weight, was.weight), (layer.activation, was.activation)):
            assert isinstance(now, TensorChoice) and isinstance(before, TensorChoice)
            assert now.candidate() == before.candidate() and now.tuned
    assert turned
    moved = {
        key for key, value in found.tensors.items() if not torch.equal(value, bundle.tensors.get(key, value))
    }
    moved |= found.tensors.keys() - bundle.tensors.keys()
    assert {key.rpartition(".")[2] for key in moved} == {"codes", "scale", "bias"}
    assert not any(key.endswith("weight.scale") for key in moved)


def test_rebuilt_from_disk_it_is_what_was_tuned_to_the_bit(
    model: nn.Module, bundle: Bundle, tmp_path: Path
) -> None:
    inputs = dqss.Samples.of(pictures())
    work = _Work(model, bundle, inputs, together(), None, 0, Reporter(), None, False)
    work.learn_together(None)
    assert work.together is not None and work.together.codes
    work.result().save(tmp_path)
    with torch.no_grad():
        rebuilt = apply_strategy(model, dqss.load(tmp_path))(pictures(9, 5))
        assert torch.equal(rebuilt, work.quantized(pictures(9, 5)))


def test_what_is_not_better_is_left_as_it_was(model: nn.Module, bundle: Bundle) -> None:
    wild = together(network_step_learning_rate=3.0, network_iterations=5)
    repaired = repair_strategy(model, bundle, pictures(), wild).bundle
    record: Any = repaired.strategy.repair
    before, after = record["network"]["held_out"]
    assert after >= before and not record["network"]["kept"]
    assert repaired.tensors.keys() == bundle.tensors.keys()
    assert all(torch.equal(value, bundle.tensors[key]) for key, value in repaired.tensors.items())
    assert repaired.strategy.layers == bundle.strategy.layers


class Stop(Reporter):
    """Asks to stop after so many questions."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted(15)


def test_interrupted_it_goes_on_to_the_same_bits(
    model: nn.Module, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "KEEP_EVERY", 10)
    whole = repair_strategy(model, bundle, pictures(), together()).bundle
    with pytest.raises(Interrupted):
        repair_strategy(model, bundle, pictures(), together(), folder=tmp_path, reporter=Stop(26))
    resumed: list[int] = []
    keep = network_module.KeptSteps.get

    def get(self: Any, optimizer: Any) -> int:
        resumed.append(keep(self, optimizer))
        return resumed[-1]

    monkeypatch.setattr(network_module.KeptSteps, "get", get)
    again = repair_strategy(model, bundle, pictures(), together(), folder=tmp_path).bundle
    assert resumed == [20]
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(value, whole.tensors[key]) for key, value in again.tensors.items())
    # With other settings nothing of it is used.
    repair_strategy(model, bundle, pictures(), together(network_learning_rate=0.01), folder=tmp_path)
    assert resumed == [20, 0]


def grid(scale: Tensor, zero_point: Tensor, bits: int = 3) -> Grid:
    return Grid(scale, zero_point, QuantSpec(bits=bits, symmetric=False, granularity=PerChannel(0)))


def test_a_rounding_begins_at_its_codes_whatever_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 50, generator=generator)
    own = grid(torch.full((4,), 0.2), torch.full((4,), 3.0))  # clips some
    for codes in (
        Codes.of(weight, own),
        Codes.from_integers(torch.randint(0, 8, weight.shape, generator=generator).float(), own),
    ):
        rounding = StraightRounding(weight, codes)
        assert torch.equal(rounding.codes().integers, codes.integers)
        assert torch.equal(rounding(weight).detach(), codes.dequantize())


def test_the_gradient_is_that_of_a_weight_between_the_codes() -> None:
    """Against differences of the loss itself, in a network that is linear in its weight."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator) for shape in ((4, 6), (3, 6)))
    own = grid(torch.rand(4, generator=generator) + 0.5, torch.full((4,), 3.0))
    rounding = StraightRounding(weight, Codes.of(weight, own))
    factors = torch.randn(3, 4, generator=generator)
    (factors * (x @ rounding(weight).T)).sum().backward()
    assert rounding.h.grad is not None
    for place in [(0, 0), (1, 3), (3, 5)]:
        losses = []
        for up in (0.0, 1.0):
            with torch.no_grad():
                rounding.h[place] = up
                losses.append(float((factors.double() * (x.double() @ rounding(weight).double().T)).sum()))
        assert float(rounding.h.grad[place]) == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_blends_lie_between_two_inputs_and_words_are_left_alone() -> None:
    x = torch.rand(6, 2, 3)
    mixed = blend({"x": x, "y": 10 * x}, 6, generator_for(0, "a"))
    assert torch.allclose(mixed["y"], 10 * mixed["x"])  # the same partner and share
    partner = torch.randperm(6, generator=generator_for(0, "a"))
    low, high = torch.minimum(x, x[partner]), torch.maximum(x, x[partner])
    assert ((mixed["x"] >= low - 1e-6) & (mixed["x"] <= high + 1e-6)).all() and not torch.equal(mixed["x"], x)
    words = {"ids": torch.arange(6), "x": x}
    assert not can_blend(words) and blend(words, 6, generator_for(0)) is words


@pytest.mark.parametrize(
    "name", ["network_iterations", "network_learning_rate", "network_step_learning_rate"]
)
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(UserError, match=f"repair.{name}=-1"):
        RepairSettings(**{name: -1})  # type: ignore[arg-type]
