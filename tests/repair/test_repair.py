"""The repaired strategy: better blocks, the same network to the bit wherever it is rebuilt, resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy, weight_codes
from dqss.bundle import Bundle
from dqss.errors import DataError, StrategyError, UserError
from dqss.mixing import Codes
from dqss.progress import Interrupted, Reporter
from dqss.repair import Repaired, RepairSettings, repair_strategy
from dqss.repair.repair import _Work
from dqss.repair.units import Unit, capturing
from search_spaces import uniform
from tests.repair.support import FAST, network, pictures, settings, strategy_for
from tests.support.nets import bundle_of, prepared_supernet


@pytest.fixture(scope="module")
def repaired(model: nn.Module, bundle: Bundle) -> Repaired:
    options = settings(iterations=200, learn_steps=True, bias_correction=True)
    return repair_strategy(model, bundle, pictures(), options)


def error(model: nn.Module, one: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((one(inputs) - model(inputs)).square().mean())


def test_blocks_come_nearer_on_inputs_that_nothing_learned_from(
    model: nn.Module, bundle: Bundle, repaired: Repaired
) -> None:
    others = pictures(64, seed=99)
    exact = dqss.prepare.prepare(model, others[:4]).model
    for name, errors in repaired.errors.items():
        assert errors.kept and 0 < errors.changed < 0.5, name
        for before, after in (errors.learned, errors.held_out):
            assert after < (1.0 if name == "head" else 0.8) * before, name
    # Measured again, on others still, block by block, each fed by the float network.
    for name in ("blocks.0", "blocks.1"):
        unit = Unit((name,), ())
        seen: list[Tensor] = []
        with torch.no_grad(), capturing(exact, unit, lambda x: seen.append(x.clone()), seen.append) as run:  # noqa: B023
            run(others)
        found = []
        for one in (bundle, repaired.bundle):
            with torch.no_grad():
                output = unit.run(apply_strategy(model, one), seen[0].clone())
            found.append(float((output - seen[1]).square().mean()))
        assert found[1] < found[0], name
    plain, tuned = (apply_strategy(model, one) for one in (bundle, repaired.bundle))
    assert error(model, tuned, others) < 0.7 * error(model, plain, others)


def test_it_begins_at_roundings_that_were_fitted(model: nn.Module) -> None:
    """Where nothing moves, all codes are those of the search, and not the nearest ones."""
    bundle = strategy_for(model, pictures(), algorithm="adaround")
    exact = dqss.prepare.prepare(model, pictures(4)).model
    for name in bundle.strategy.layers:
        weight: Any = exact.get_submodule(name).weight
        codes = weight_codes(bundle, name, weight)
        assert not torch.equal(codes.integers, Codes.of(weight, codes.grid).integers), name
    still = settings(iterations=1, learning_rate=1e-9, blocks=())
    repaired = repair_strategy(model, bundle, pictures(), still)
    for name, errors in repaired.errors.items():
        assert errors.learned[1] == errors.learned[0], name


def test_codes_are_the_nearest_or_next_to_them(model: nn.Module, bundle: Bundle, repaired: Repaired) -> None:
    exact = dqss.prepare.prepare(model, pictures(4)).model
    for name, layer in repaired.bundle.strategy.layers.items():
        weight: Any = exact.get_submodule(name).weight
        codes = weight_codes(repaired.bundle, name, weight)
        nearest = weight_codes(bundle, name, weight)
        assert isinstance(codes, Codes) and layer.weight is not None and layer.weight.tuned
        assert (codes.integers.int() - nearest.integers.int()).abs().max() == 1
        assert torch.equal(codes.grid.scale, nearest.grid.scale)


@pytest.mark.parametrize(
    "options",
    [
        {"learn_steps": True, "bias_correction": True},
        {"learn_weight_steps": True, "learn_biases": True},
        {"learn_weight_steps": True, "learn_biases": True, "network_iterations": 3},
    ],
    ids=lambda options: "+".join(options),
)
def test_rebuilt_from_disk_it_is_what_was_tuned_to_the_bit(
    model: nn.Module, bundle: Bundle, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = settings(**options)
    work = _Work(model, bundle, dqss.Samples.of(pictures()), options, None, 0, Reporter(), None, False)
    work.reconstruct()
    if options.network_iterations:
        work.learn_together(None)
    if options.bias_correction:
        work.correct()
    work.result().save(tmp_path)
    rebuilt = apply_strategy(model, dqss.load(tmp_path))
    with torch.no_grad():
        assert torch.equal(rebuilt(pictures(9, 5)), work.quantized.requires_grad_(False)(pictures(9, 5)))
    record = dqss.load(tmp_path).strategy.repair
    assert record is not None and list(record["blocks"]) == ["stem", "blocks.0", "blocks.1", "head"]  # type: ignore[arg-type]


def test_learned_steps_move_and_are_stored(bundle: Bundle, repaired: Repaired) -> None:
    moved = 0
    for name, layer in repaired.bundle.strategy.layers.items():
        key = f"{name}.activation.scale"
        assert layer.activation is not None and layer.activation.tuned
        assert torch.equal(
            bundle.tensors[f"{name}.activation.zero_point"],
            repaired.bundle.tensors[f"{name}.activation.zero_point"],
        )
        moved += not torch.equal(bundle.tensors[key], repaired.bundle.tensors[key])
    assert moved == len(repaired.bundle.strategy.layers)


def linear(weight: Tensor, inputs: Tensor, **changed: float) -> tuple[nn.Module, Bundle]:
    """One layer with a strategy whose tensors are as many times as large."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0])).eval()
    model[0].weight.data.copy_(weight)
    bundle = strategy_for(model, inputs, 4)
    tensors = {
        key: tensor * changed.get(key.removeprefix("0.").replace(".", "_"), 1.0)
        for key, tensor in bundle.tensors.items()
    }
    return model, Bundle(bundle.strategy.model_copy(update={"tensors_sha256": None}), tensors)


def test_steps_of_weights_learn() -> None:
    torch.manual_seed(0)
    weight = 0.1 * torch.randint(-7, 8, (5, 8)).float()
    weight[:, 0] = 0.7
    model, bundle = linear(weight, torch.randn(96, 8), weight_scale=1.07)
    options = settings(iterations=600, float_inputs=0.0, drop=1.0)
    wrong = bundle.tensors["0.weight.scale"]
    for learn in (False, True):
        found = repair_strategy(model, bundle, torch.randn(96, 8), replace(options, learn_weight_steps=learn))
        scale = found.bundle.tensors["0.weight.scale"]
        if learn:  # the only step with which the layer is exact
            torch.testing.assert_close(scale, wrong / 1.07, atol=0, rtol=0.005)
            assert found.errors["0"].held_out[1] < 1e-3
        else:
            assert torch.equal(scale, wrong) and found.errors["0"].held_out[1] > 2e-3


def test_steps_that_are_powers_of_two_stay_so(model: nn.Module) -> None:
    inputs = pictures()
    space = uniform(3, 8, ["power_of_two"], ["power_of_two"])
    prepared, supernet = prepared_supernet(model, inputs, space)
    shifted = bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), inputs[:4])
    options = settings(learn_steps=True, learn_weight_steps=True, network_iterations=2)
    found = repair_strategy(model, shifted, inputs, options)
    assert any(layer.weight and layer.weight.tuned for layer in found.bundle.strategy.layers.values())
    for key in (key for key in shifted.tensors if key.endswith(".scale")):
        assert torch.equal(found.bundle.tensors[key], shifted.tensors[key]), key


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_steps_of_every_granularity(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    inputs = torch.randn(96, 16)
    space = uniform(
        3, 8, ["minmax"], ["minmax"], weight_granularity=granularity, weight_group_size=8, skip=["2"]
    )
    prepared, supernet = prepared_supernet(model, inputs, space)
    bundle = bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), inputs[:4])
    options = settings(iterations=200, drop=0.0, float_inputs=0.0, held_out=0.0, learn_weight_steps=True)
    work = _Work(model, bundle, dqss.Samples.of(inputs), options, None, 0, Reporter(), None, False)
    work.reconstruct()
    work.result().save(tmp_path)
    found = dqss.load(tmp_path)
    assert found.tensors["0.weight.scale"].numel() == {"tensor": 1, "channel": 8, "group": 16}[granularity]
    assert work.errors["0"].kept
    assert not torch.equal(found.tensors["0.weight.scale"], bundle.tensors["0.weight.scale"])
    with torch.no_grad():
        assert torch.equal(apply_strategy(model, found)(inputs), work.quantized(inputs))


def test_biases_learn() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(400, 8)
    model, bundle = linear(torch.rand(5, 8), inputs, activation_scale=0.5)  # so that half of them are clipped
    options = settings(iterations=200, float_inputs=0.0, drop=0.0, learn_biases=True, step_learning_rate=0.02)
    found = repair_strategy(model, bundle, inputs, options)
    assert found.bundle.strategy.layers["0"].bias_corrected
    with torch.no_grad():
        means = [
            float((apply_strategy(model, one)(inputs) - model(inputs)).mean(0).abs().max())
            for one in (bundle, found.bundle)
        ]
    assert means[1] < 0.1 * means[0]


def test_nothing_asked_is_nothing_changed(model: nn.Module, bundle: Bundle) -> None:
    same = repair_strategy(model, bundle, pictures(), RepairSettings(iterations=0)).bundle
    assert same.tensors.keys() == bundle.tensors.keys()
    assert same.strategy.layers == bundle.strategy.layers


def test_a_file_gives_the_tuned_answers(
    model: nn.Module, bundle: Bundle, repaired: Repaired, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    report = dqss.export_model(model, repaired.bundle, tmp_path / "model.onnx", pictures(16, 7))
    assert report.parity.parts  # compared, or it would not have been written
    # And these are other answers than those of plain rounding.
    plain, tuned = (apply_strategy(model, one) for one in (bundle, repaired.bundle))
    with torch.no_grad():
        assert not torch.equal(plain(pictures(4)), tuned(pictures(4)))


def test_a_file_of_affine_weights_with_learned_steps(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    affine = strategy_for(model, pictures(), symmetric=False)
    tuned = repair_strategy(
        model, affine, pictures(), settings(learn_weight_steps=True, learn_biases=True)
    ).bundle
    assert any(layer.weight and not layer.weight.symmetric for layer in tuned.strategy.layers.values())
    assert not torch.equal(tuned.tensors["head.weight.scale"], affine.tensors["head.weight.scale"])
    assert dqss.export_model(model, tuned, tmp_path / "model.onnx", pictures(16, 7)).parity.parts


class Stop(Reporter):
    """Asks to stop in the middle of a unit, and notes what was said."""

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.left, self.said = after, list[str]()

    def check(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted(15)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_finished_blocks_are_not_repeated(model: nn.Module, bundle: Bundle, tmp_path: Path) -> None:
    options = settings(learn_steps=True, learn_weight_steps=True, learn_biases=True)
    whole = repair_strategy(model, bundle, pictures(), options, folder=tmp_path / "whole")
    with pytest.raises(Interrupted):
        repair_strategy(model, bundle, pictures(), options, folder=tmp_path / "cut", reporter=Stop(150))
    kept = sorted(path.name for path in (tmp_path / "cut" / "repair").iterdir())
    assert kept == ["000.safetensors", "001.safetensors"]
    counted = Stop(None)
    ran: list[int] = []
    counted.check = lambda: ran.append(1)  # type: ignore[method-assign]
    again = repair_strategy(model, bundle, pictures(), options, folder=tmp_path / "cut", reporter=counted)
    assert len(ran) == 2 + 2 * FAST["iterations"]
    assert again.errors == whole.errors
    assert again.bundle.tensors.keys() == whole.bundle.tensors.keys()
    for key, tensor in whole.bundle.tensors.items():
        assert torch.equal(tensor, again.bundle.tensors[key]), key
    assert not list((tmp_path / "cut").glob(".dqss-cache-*"))
    # What was found with other settings, or is damaged, is not taken.
    (tmp_path / "cut" / "repair" / "000.safetensors").write_bytes(b"damaged")
    ran.clear()
    repair_strategy(model, bundle, pictures(), options, folder=tmp_path / "cut", reporter=counted)
    assert len(ran) == 3 + FAST["iterations"]
    ran.clear()
    other = settings(learn_steps=True, drop=0.25)
    repair_strategy(model, bundle, pictures(), other, folder=tmp_path / "cut", reporter=counted)
    assert len(ran) == 4 * FAST["iterations"]


def test_a_small_memory_gives_the_same(model: nn.Module, bundle: Bundle, tmp_path: Path) -> None:
    wide, narrow = (
        repair_strategy(model, bundle, pictures(), settings(cache_mb=size), folder=tmp_path / str(size))
        for size in (2048, 0.1)
    )
    for key, tensor in wide.bundle.tensors.items():
        assert torch.equal(tensor, narrow.bundle.tensors[key])


def test_layer_by_layer_with_plain_activations(model: nn.Module, bundle: Bundle) -> None:
    options = settings(blocks=(), drop=0.0, float_inputs=0.0)
    found = repair_strategy(model, bundle, pictures(), options)
    assert list(found.errors) == list(bundle.strategy.layers)
    assert all(errors.held_out[1] < errors.held_out[0] for errors in found.errors.values() if errors.kept)
    assert sum(errors.kept for errors in found.errors.values()) >= 5


def test_a_unit_that_does_not_improve_is_left_as_it_was(model: nn.Module, bundle: Bundle) -> None:
    # One iteration with a wild step: roundings become random.
    found = repair_strategy(model, bundle, pictures(), settings(iterations=1, learning_rate=1e3))
    assert not any(errors.kept for errors in found.errors.values())
    assert found.bundle.tensors.keys() == bundle.tensors.keys()
    assert all(layer.weight and not layer.weight.tuned for layer in found.bundle.strategy.layers.values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.free(torch.relu(self.two(torch.relu(self.one(x)))))


def test_shared_weights_keep_their_common_rounding() -> None:
    torch.manual_seed(0)
    model, inputs = Tied().eval(), torch.randn(40, 6)
    prepared, supernet = prepared_supernet(model, inputs, uniform(3, 8, ["minmax"], ["minmax"]))
    bundle = bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), inputs)
    found = repair_strategy(model, bundle, inputs, settings())
    assert found.left == ["one", "two"] and list(found.errors) == ["free"]
    tuned = apply_strategy(model, found.bundle)
    assert torch.equal(tuned.one.weight, tuned.two.weight)  # type: ignore[arg-type]


def test_what_it_refuses(model: nn.Module, bundle: Bundle) -> None:
    mixed = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9)]
    with pytest.raises(DataError, match="differ in shape"):
        repair_strategy(model, bundle, mixed, settings())
    with pytest.raises(StrategyError, match="other weights"):
        repair_strategy(network(5), bundle, pictures(), settings())
    for options, words in (
        ({"drop": 2.0}, r"repair.drop=2.0: expected a share"),
        ({"batch_size": 0}, r"repair.batch_size=0: expected a positive"),
        ({"iterations": -1}, r"repair.iterations=-1: expected 0"),
        ({"held_out": 1.0}, "leaves no inputs"),
    ):
        with pytest.raises(UserError, match=words):
            RepairSettings(**options)  # type: ignore[arg-type]


def test_bundles_whose_tuned_tensors_do_not_fit(repaired: Repaired) -> None:
    good = repaired.bundle
    for key, tensor, words in (
        ("head.weight.codes", None, "missing"),
        ("head.weight.codes", torch.zeros(5, 8), "expected integer codes"),
        ("head.weight.codes", torch.full((5, 8), 100, dtype=torch.int8), r"expected integers in -4..3"),
        ("head.bias", None, "missing"),
        ("head.bias", torch.full((5,), torch.nan), "expected finite fp32"),
    ):
        tensors = {k: t for k, t in good.tensors.items() if k != key}
        tensors |= {} if tensor is None else {key: tensor}
        with pytest.raises(StrategyError, match=words):
            Bundle(good.strategy, tensors)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("head.weight.codes", torch.zeros(5, 7, dtype=torch.int8)), ("head.bias", torch.zeros(4))],
)
def test_tuned_tensors_of_another_network(
    model: nn.Module, repaired: Repaired, key: str, tensor: Tensor
) -> None:
    other = Bundle(repaired.bundle.strategy, {**repaired.bundle.tensors, key: tensor})
    with pytest.raises(StrategyError, match="for another model"):
        apply_strategy(model, other)
