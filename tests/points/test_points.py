"""Points: where they are put, that one tensor has one quantizer, and that simulation and file agree."""

import copy
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.bundle import Bundle, load
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU
from dqss.errors import SearchSpaceError, StrategyError
from dqss.functional import fake_quantize
from dqss.space import Points, SearchSpace
from dqss.strategy import Strategy
from dqss.supernet import Supernet
from dqss.ties import tie
from dqss.trainable import TrainableSupernet
from search_spaces import uniform
from tests.support.nets import (
    EVERY_PASS,
    bundle_of,
    calibrated,
    evaluator_of,
    every_other,
    output,
    prepared_supernet,
    small_space,
)

WIDTH = 6


def space(algorithms: Any = ("minmax", "mse"), **options: Any) -> SearchSpace:
    return ONNXRUNTIME_CPU.adapt(small_space(8, algorithms, **options))


def conv(inputs: int = WIDTH, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, WIDTH, size, padding=size // 2)


def batch(count: int = 4) -> Tensor:
    return torch.randn(count, WIDTH, 8, 8)


def added(x: Tensor, y: Tensor) -> Tensor:
    """A plain function: no module knows of it."""
    return x + y


class Residual(nn.Module):
    """A block whose input is read by a layer and by an addition in a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(added(self.second(F.relu(self.first(x))), x))


class InPlace(Residual):
    """The same, into the tensor itself, which somebody else holds too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu_(self.first(x)))
        held = y.flatten(1)
        y += x
        return F.relu(held.unflatten(1, y.shape[1:]))


class Writes(Residual):
    """The same, with nobody else to see it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu_(self.first(x)))
        y += x
        return F.relu_(y)


class Concatenates(nn.Module):
    """Two ways, and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = conv(), conv(size=1), conv(3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), F.relu(self.right(x)), x], 1))


class Network(nn.Module):
    """A stem, blocks, an average and a head."""

    def __init__(self, *blocks: nn.Module, channels: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv(), nn.Sequential(*blocks), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Bare(nn.Module):
    """Layers whose outputs go where no kernel takes them in."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth, self.gate, self.last = conv(), conv(size=1), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.smooth(x))
        return self.last(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


NETWORKS = {
    "residual": lambda: Network(Residual(), Residual()),
    "in place": lambda: Network(InPlace(), InPlace()),
    "concatenation": lambda: Network(Concatenates(), Residual()),
    "bare": lambda: Network(Bare(), Residual()),
    "no head": Bare,
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def bundle_for(model: nn.Module, inputs: Tensor, start: int = 0, **options: Any) -> Bundle:
    prepared, supernet = prepared_supernet(model, inputs, space(**options))
    return bundle_of(prepared, supernet, every_other(supernet, start), inputs)


def test_where_points_are() -> None:
    found = {name: list(calibrated(make(), batch(), space=space()).points) for name, make in NETWORKS.items()}
    blocks = ["blocks.0.point0", "blocks.1.point0"]
    assert found["residual"] == [*blocks, "point0"]
    # Nobody can see that it is the sum that is read by another name.
    assert found["in place"] == [*blocks, "blocks.0.second", "blocks.1.second"]
    assert found["concatenation"] == [*blocks, "point0"]
    # What a layer takes no further: before silu and sigmoid, and the network's own output.
    assert found["bare"] == ["blocks.1.point0", "point0", "blocks.0.smooth", "blocks.0.gate"]
    assert found["no head"] == ["smooth", "gate", "last"]
    without = calibrated(Network(Residual()), batch(), space=small_space(8))
    assert not without.points and type(without.model) is Network


def test_all_readers_of_a_tensor_share_one_decision() -> None:
    supernet = calibrated(Network(Residual(), Residual()), batch(), space=space())
    named = supernet.named_quantizers()
    for block in ("blocks.0", "blocks.1"):
        layer, point = named[f"{block}.first.activation"], named[f"{block}.point0.right"]
        assert layer.decision is point.decision
        assert named[f"{block}.point0.left"].decision.name == f"{block}.point0.left"
    assert ["blocks.1.first.activation", "blocks.1.point0.right"] in supernet.coverage.ties


@pytest.mark.parametrize("algorithms", [EVERY_PASS, ("minmax", "mse", "entropy")])
def test_they_have_one_grid_each(algorithms: Any) -> None:
    """Also where gradients differ from reader to reader, or the order of batches counts."""
    supernet = calibrated(Network(Residual(), Residual()), batch(), batch(), space=space(algorithms))
    quantizers: dict[str, list[Any]] = {}
    for quantizer in supernet.named_quantizers().values():
        quantizers.setdefault(quantizer.decision.name, []).append(quantizer)
    shared = [several for several in quantizers.values() if len(several) > 1]
    assert len(shared) == 2
    for first, *others in shared:
        for other in others:
            for k in range(len(first.candidates)):
                assert torch.equal(first[k].grid().scale, other[k].grid().scale)
                assert torch.equal(first[k].grid().zero_point, other[k].grid().zero_point)


@torch.no_grad()
def test_looking_for_points_shows_nothing_twice() -> None:
    """Rounding is fitted to moments of the inputs: the batch that was looked at counts once."""
    torch.manual_seed(0)
    model, batches = Network(Residual()).eval(), [batch(), 3 * batch()]
    plain = uniform(4, 8, ["adaround"], ["minmax"])
    without, points = (
        [
            layer.weight.stack.choose(0)
            for layer in calibrated(model, *batches, space=each).layers.values()
            if layer.weight is not None
        ]
        for each in (plain, replace(plain, points=ONNXRUNTIME_CPU.points))
    )
    assert len(points) == len(without) > 1
    for ours, theirs in zip(points, without, strict=True):
        assert torch.equal(ours, theirs)


def test_the_simulation_is_what_it_says() -> None:
    """By hand: every tensor that the strategy names, and no other, on its grid."""
    torch.manual_seed(1)
    model, inputs = Network(Residual(), Concatenates()).eval(), batch()
    bundle = bundle_for(model, inputs)
    applied = apply_strategy(model, bundle)

    def q(name: str, x: Tensor) -> Tensor:
        layer, role = name.rsplit(".", 1)
        choice = next(c for n, r, c in bundle.strategy.choices() if (n, r) == (layer, role))
        grid = bundle.tensors[f"{name}.scale"], bundle.tensors[f"{name}.zero_point"]
        return fake_quantize(x, *grid, choice.candidate().spec)

    def run(name: str, x: Tensor) -> Tensor:
        layer: Any = applied.get_submodule(name)
        x = q(f"{name}.activation", x)
        if isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight, layer.bias)
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)

    x = F.relu(run("stem", inputs))
    y = run("blocks.0.second", F.relu(run("blocks.0.first", x)))
    x = F.relu(q("blocks.0.point0.left", y) + q("blocks.0.point0.right", x))
    parts = [run("blocks.1.left", x), F.relu(run("blocks.1.right", x)), x]
    x = run("blocks.1.last", torch.cat([q(f"blocks.1.point0.{k}", part) for k, part in enumerate(parts)], 1))
    wanted = run("head", F.adaptive_avg_pool2d(q("point0.input", x), 1).flatten(1))
    assert torch.equal(applied(inputs), wanted)


@torch.no_grad()
def test_float_mode_is_the_original_network(network: nn.Module) -> None:
    inputs = batch()
    wanted, seen = network(inputs), []
    supernet = calibrated(network, inputs, space=space())
    assert torch.equal(supernet(inputs), wanted)
    supernet.calibrate([inputs], lambda index, found: seen.append(found))
    assert torch.equal(seen[0], wanted) and torch.equal(supernet(inputs), wanted)


@torch.no_grad()
def test_a_strategy_is_what_was_searched(network: nn.Module, tmp_path: Path) -> None:
    inputs = batch()
    prepared, supernet = prepared_supernet(network, inputs, space())
    for start in range(2):
        assignment = every_other(supernet, start)
        bundle_of(prepared, supernet, assignment, inputs).save(tmp_path / str(start))
        applied = apply_strategy(network, load(tmp_path / str(start)))
        with supernet.assign(assignment):
            wanted = supernet(inputs)
        assert torch.equal(applied(inputs), wanted)
        for again in (copy.deepcopy(applied), pickle.loads(pickle.dumps(applied))):
            assert torch.equal(again(inputs), wanted)


def test_every_decision_gets_a_gradient(network: nn.Module) -> None:
    inputs = batch()
    supernet = calibrated(network, inputs, space=space(["minmax", {"name": "percentile", "p": 90.0}]))
    with supernet.mode("relaxed"):
        output(supernet, inputs).square().sum().backward()
    for name, point in supernet.points.items():
        for _, quantizer in point.operands():
            gradient = quantizer.decision.logits.grad
            assert gradient is not None and gradient.abs().max() > 0, name
    evaluator = evaluator_of(supernet, inputs, {"refine": list(range(4))})
    evaluator.first_order(every_other(supernet), "refine")


def test_the_gradient_of_a_sum_in_place() -> None:
    """Against the same network with a sum that makes a new tensor."""
    torch.manual_seed(2)
    model, inputs = Network(Writes()).eval(), batch()
    plain = Network(Residual()).eval()
    plain.load_state_dict(model.state_dict())
    found = []
    for each in (model, plain):
        supernet = calibrated(each, inputs, space=space())
        with supernet.mode("relaxed"):
            x = inputs.clone().requires_grad_()
            out = supernet(x)
            out.square().sum().backward()
        logits = [d.logits.grad for d in supernet.decisions.values()]
        found.append([out.detach(), x.grad, *logits])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_file_equals_the_simulation(network: nn.Module, tmp_path: Path) -> None:
    inputs = batch(8)
    bundle = bundle_for(network, inputs)
    report = dqss.export_model(network, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    integer = [row for row in report.parity.parts if row.part.call is not None]
    assert {row.part.call[0] for row in integer if row.part.call} >= {
        f"{name}.{operand}"
        for name, point in bundle.strategy.points.items()
        for operand in point.operands
        if point.operands[operand].decision == f"{name}.{operand}"
    }
    assert max(row.largest for row in integer) <= 1
    assert not report.kernels.floating, report.kernels
    # Every tensor is quantized once, and integers are not quantized again.
    graph = onnx.load(report.path).graph
    quantized = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    restored = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert set(Counter(quantized).values()) == {1} and not restored & set(quantized)


def test_without_points_an_export_says_so(tmp_path: Path) -> None:
    model, inputs = Network(Residual()).eval(), batch(8)
    prepared, supernet = prepared_supernet(model, inputs, small_space(8, ["minmax"]))
    bundle = bundle_of(prepared, supernet, supernet.argmax(), inputs)
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert report.kernels.floating
    assert any("a search with target=onnxruntime-cpu" in note for note in report.notes)
    assert not dqss.export_model(model, bundle, tmp_path / "generic.onnx", inputs).notes


def test_repair_leaves_one_tensor_one_step(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, inputs = Network(Residual(), Residual()).eval(), batch(24)
    searched = ONNXRUNTIME_CPU.adapt(uniform(3, 8, ["mse"], ["mse"]))
    prepared, supernet = prepared_supernet(model, inputs, searched)
    bundle = bundle_of(prepared, supernet, supernet.argmax(), inputs)
    settings = dqss.RepairSettings(iterations=100, learn_steps=True)
    repaired = dqss.repair_strategy(model, bundle, inputs, settings).bundle
    learned = {key for key, t in repaired.tensors.items() if not torch.equal(t, bundle.tensors.get(key, t))}
    assert any(key.endswith(".second.activation.scale") for key in learned)
    assert not any(key.endswith(".first.activation.scale") for key in learned)
    report = dqss.export_model(model, repaired, tmp_path / "m.onnx", inputs, target=ONNXRUNTIME_CPU)
    quantized = [
        node.input[0] for node in onnx.load(report.path).graph.node if node.op_type == "QuantizeLinear"
    ]
    assert len(quantized) == len(set(quantized)) and not report.kernels.floating


class Rows(nn.Sequential):
    """A container that adds: nothing can be put around its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Varies(Residual):
    """Adds as often as its input says."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        for _ in range(len(x)):
            y = y + x
        return y


def test_what_cannot_be_put_around_is_listed_and_exports(tmp_path: Path) -> None:
    model, inputs = Network(Rows(conv()), Residual()).eval(), batch(8)
    prepared, supernet = prepared_supernet(model, inputs, space())
    assert supernet.coverage.hidden_points == ["blocks.0.point0"]
    assert list(supernet.points) == ["blocks.1.point0", "point0", "stem", "blocks.0.0"]
    bundle = bundle_of(prepared, supernet, every_other(supernet), inputs)
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert max(row.largest for row in report.parity.parts if row.part.call is not None) <= 1


@torch.no_grad()
def test_what_does_not_always_add_alike_stays_in_float() -> None:
    supernet = calibrated(Network(Varies(), Residual()), batch(2), batch(3), space=space())
    assert supernet.coverage.hidden_points == [f"blocks.0.point{k}" for k in range(2)]
    assert list(supernet.points) == ["blocks.1.point0", "point0"]
    with supernet.mode("discrete"):
        assert torch.isfinite(supernet(batch(4))).all()


def test_scripted_functions_hide_what_reads_an_output() -> None:
    script = torch.jit.script(added)

    class Scripted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(script(self.second(F.relu(self.first(x))), x))

    supernet = Supernet(Network(Scripted()).eval(), space())
    supernet.calibrate([batch()])
    assert list(supernet.points) == ["blocks.0.second"]


def test_rules_speak_about_points() -> None:
    def searched(**options: Any) -> list[str]:
        return list(calibrated(Network(Residual()), batch(), space=space(**options)).points)

    assert searched(skip_types=["Point"]) == []
    assert searched(skip=["blocks.*.point0"]) == ["point0"]
    with pytest.raises(SearchSpaceError, match="no layer matches 'point9'"):
        searched(skip=["point9"])
    with pytest.raises(SearchSpaceError, match="no layer is a 'Point'"):
        calibrated(Network(Residual()), batch(), space=small_space(8, skip_types=["Point"]))
    channels = replace(small_space(8, activation_granularity="channel"), points=Points(("Conv2d",)))
    with pytest.raises(SearchSpaceError, match=r"per-tensor .*skip_types=\[Point\]"):
        calibrated(Network(Residual()), batch(), space=channels)
    with pytest.raises(SearchSpaceError, match=r"per-tensor .*'smooth'.* skip=\[smooth\]"):
        calibrated(Bare(), batch(), space=channels)


def test_layers_in_float_need_none() -> None:
    supernet = calibrated(Network(Residual()), batch(), space=space(skip=["blocks.*"]))
    assert list(supernet.points) == ["point0", "stem"]  # whose output such a layer reads
    assert not calibrated(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), space=space()).points


def test_linear_layers_give_real_numbers() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x + self.first(x))

    assert not calibrated(Stream(), torch.randn(5, 4), space=space()).points


def test_ties_of_the_user_join_those_of_points() -> None:
    tied = replace(space(), ties=(("blocks.*.first.activation",),))
    _, supernet = prepared_supernet(Network(Residual(), Residual()), batch(), tied)
    tie(supernet, batch(1))
    named = supernet.named_quantizers()
    names = [f"blocks.{k}.{name}" for k in range(2) for name in ("first.activation", "point0.right")]
    assert len({id(named[name].decision) for name in names}) == 1
    assert sorted(supernet.coverage.ties[0]) == sorted(names) and len(supernet.coverage.ties) == 1


def test_training_refuses_them() -> None:
    with pytest.raises(SearchSpaceError, match="points of quantization are searched by method=ptq only"):
        TrainableSupernet(Network(Residual()), space())
    assert GENERIC.adapt(small_space(8)).points is None


@torch.no_grad()
def test_another_model_is_refused() -> None:
    model, inputs = Network(Residual()).eval(), batch()
    bundle = bundle_for(model, inputs)
    other = Network(Varies()).eval()
    other.load_state_dict(model.state_dict())
    points = {"blocks.0.point1": bundle.strategy.points["blocks.0.point0"]}
    tensors = {key.replace("blocks.0.point0", "blocks.0.point1"): t for key, t in bundle.tensors.items()}
    moved = Bundle(bundle.strategy.model_copy(update={"points": points}), tensors)
    with pytest.raises(StrategyError, match=r"point 'blocks\.0\.point1' was not computed: the network adds"):
        apply_strategy(model, moved)
    kinds = {"point0": bundle.strategy.points["point0"].model_copy(update={"kind": "sum"})}
    wrong = Bundle(bundle.strategy.model_copy(update={"points": kinds}), bundle.tensors)
    with pytest.raises(StrategyError, match=r"point 'point0' is of the kind 'pool' here and was 'sum'"):
        apply_strategy(model, wrong)


def test_strategies_without_points_are_written_as_before() -> None:
    model, inputs = Network(Residual()).eval(), batch()
    prepared, supernet = prepared_supernet(model, inputs, small_space(8))
    text = bundle_of(prepared, supernet, supernet.argmax(), inputs).strategy.to_json()
    assert '"points"' not in text and Strategy.parse(text).points == {}
    text = bundle_for(model, inputs).strategy.to_json()
    assert Strategy.parse(text).to_json() == text
    with pytest.raises(StrategyError, match=r"operand 'left': pool has input"):
        Strategy.parse(text.replace('"input": {\n          "algorithm"', '"left": {\n          "algorithm"'))


def test_a_search_with_a_target_exports_what_it_simulated(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, inputs = Network(Residual(), Concatenates()).eval(), batch(24)
    settings = dqss.PTQSettings(steps=4, batch_size=4)
    searched = ONNXRUNTIME_CPU.adapt(uniform(8, 8, ["minmax", "mse"], ["minmax", "mse"]))
    result = dqss.search_ptq(model, inputs, searched, settings, run_dir=tmp_path)
    assert set(load(tmp_path).strategy.points) == {"blocks.0.point0", "blocks.1.point0", "point0"}
    quantized = result.quantized()
    chosen = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(chosen):
        assert torch.equal(quantized(inputs[:4]), result.supernet(inputs[:4]))
    report = dqss.export_model(model, load(tmp_path), tmp_path / "m.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert not report.kernels.floating
    assert "3 points" in (tmp_path / "report.html").read_text()
