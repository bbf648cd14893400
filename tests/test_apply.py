"""A strategy applied to the model is the discrete supernet, bit for bit; and to no other model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dqss.apply import apply_strategy
from dqss.bundle import Bundle
from dqss.calls import call_model
from dqss.errors import StrategyError
from dqss.layers import searchable_layers
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.prepare import fingerprint, prepare
from dqss.supernet import Supernet
from tests.support.nets import (
    EVERY_PASS,
    THREE,
    bundle_of,
    cnn,
    every_other,
    images,
    output,
    prepared_supernet,
    small_space,
)
from tests.support.zoo import NETWORKS, Tied, Twice


def weight_normed() -> nn.Module:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        parametrizations.weight_norm(nn.ConvTranspose2d(4, 3, 2, groups=1)),
    )
    model[1].running_mean.normal_()
    return model


MODELS = {**NETWORKS, "weight norm": (weight_normed, lambda: images(2))}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, batch = MODELS[request.param]
    return make().eval(), batch()


SPACES = [
    small_space(4, THREE),
    small_space([3, 8], weight_granularity="tensor", activation_granularity="channel"),
    small_space(5, weight_symmetric=False, activation_symmetric=True),
    small_space(
        4,
        EVERY_PASS,
        weight_granularity=["group", "tensor"],
        weight_group_size=[4, 6],
        activation_symmetric=True,
    ),
    small_space([3, 16], ["mse"], activation_symmetric=[True, False], activation_signed=[True, False]),
]
SPACE_NAMES = ["channel-tensor", "tensor-channel", "signs swapped", "groups", "sixteen bits, every sign"]


@torch.no_grad()
@pytest.mark.parametrize("space", SPACES, ids=SPACE_NAMES)
def test_applied_is_the_discrete_supernet_bit_for_bit(
    case: tuple[nn.Module, Any], space: Any, tmp_path: Path
) -> None:
    model, batch = case
    before, kind = fingerprint(model), type(model)
    prepared, supernet = prepared_supernet(model, batch, space)
    for start in (0, 1):
        assignment = every_other(supernet, start)
        with supernet.assign(assignment):
            wanted = output(supernet, batch)
        bundle = bundle_of(prepared, supernet, assignment, batch)
        bundle.save(tmp_path / str(start))
        for given in (bundle, Bundle.load(tmp_path / str(start))):
            applied = apply_strategy(model, given)
            assert torch.equal(output(applied, batch), wanted)
            assert not applied.training and type(applied) is kind
            # ... and without a trace of the supernet
            twin = copy.deepcopy(applied)
            assert torch.equal(output(twin, batch), wanted)
    assert fingerprint(model) == before
    layers = searchable_layers(model).values()
    assert not any(layer._forward_pre_hooks for layer, _ in layers if isinstance(layer, nn.Linear))


@torch.no_grad()
def test_the_strategy_says_what_was_assigned() -> None:
    model, batch = cnn(), images(4)
    prepared, supernet = prepared_supernet(model, batch, small_space(3, THREE))
    assignment = every_other(supernet)
    with torch.no_grad():
        for decision in supernet.decisions.values():
            decision.logits.copy_(torch.tensor([2.0, 1.0, 0.0]))
    bundle = bundle_of(prepared, supernet, assignment, batch)
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0]).double(), 0)
    margins = [p[0] - p[1], p[1] - p[0], p[2] - p[0]]
    seen = set()
    for layer, role, choice in bundle.strategy.choices():
        index = assignment[choice.decision]
        seen.add(choice.decision)
        assert choice.decision == f"{layer}.{role}"
        assert choice.candidate() == supernet.decisions[choice.decision].options[index]
        assert choice.probability == pytest.approx(float(p[index]))
        assert choice.margin == pytest.approx(float(margins[index]))
    assert seen == set(assignment)
    assert bundle.strategy.model.tensors == fingerprint(model)


@torch.no_grad()
def test_quantized_weights_lie_on_their_grid_and_the_embedding_stays_float() -> None:
    model, batch = Tied(), torch.randint(0, 11, (3, 5))
    prepared, supernet = prepared_supernet(model, batch, small_space(3))
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    applied = apply_strategy(model, bundle)
    assert torch.equal(applied.embedding.weight, model.embedding.weight)
    scale = bundle.tensors["head.weight.scale"][:, None]
    codes = applied.head.weight / scale
    assert torch.equal(codes, codes.round()) and codes.min() >= -4 and codes.max() <= 3
    assert torch.equal(applied.first.weight, applied.second.weight)
    assert bundle.strategy.ties == [["first", "second"]]


@torch.no_grad()
def test_grouped_weights_lie_on_the_grids_of_their_groups() -> None:
    model, batch = cnn(), images(4)
    space = small_space(3, ["mse"], weight_granularity="group", weight_group_size=5)
    prepared, supernet = prepared_supernet(model, batch, space)
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    applied = apply_strategy(model, bundle)
    for name, (module, _) in searchable_layers(applied).items():
        scales = iter(bundle.tensors[f"{name}.weight.scale"])
        for channel in module.weight.flatten(1):
            for run in channel.split(5):
                codes = run / next(scales)
                assert torch.equal(codes, codes.round()) and codes.min() >= -4 and codes.max() <= 3
        assert next(scales, None) is None
    weight = bundle.strategy.layers["0"].weight
    assert weight is not None and weight.granularity.model_dump() == {
        "type": "per_group",
        "size": 5,
        "axis": 0,
    }


@torch.no_grad()
def test_layers_that_no_input_reached_stay_float() -> None:
    model, batch = Twice().eval(), torch.randn(5, 6)
    prepared, supernet = prepared_supernet(model, batch, small_space())
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch))
    assert torch.equal(applied.rare.weight, model.rare.weight)
    assert set(searchable_layers(model)) - {"rare", "never"} == {"shared", "head"}


def test_other_weights_are_refused_by_name_unless_forced() -> None:
    model, batch = cnn(), images(4)
    prepared, supernet = prepared_supernet(model, batch, small_space())
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1e-6
        other[6].bias[0] += 1.0
    with pytest.raises(StrategyError, match=r"other weights .*: 3\.weight, 6\.bias; force=true") as caught:
        apply_strategy(other, bundle)
    assert "\n" not in str(caught.value)
    forced = apply_strategy(other, bundle, force=True)
    plain = apply_strategy(model, bundle)
    assert (call_model(forced, batch) - call_model(plain, batch) - torch.eye(4)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("force", [False, True])
def test_other_architectures_are_refused(force: bool) -> None:
    model, batch = cnn(), images(4)
    prepared, supernet = prepared_supernet(model, batch, small_space())
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    shorter = nn.Sequential(*list(model)[:6])
    with pytest.raises(StrategyError, match="for another model"):
        apply_strategy(shorter, bundle, force=force)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_forcing_a_wider_network_of_the_same_names_is_refused_in_words(granularity: str) -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    batch = torch.randn(4, 6)
    space = small_space(activation_granularity=granularity)
    prepared, supernet = prepared_supernet(Net(4), batch, space)
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    with pytest.raises(StrategyError, match=r"4 scales for the weight of 'a'.*\[5, 6\]"):
        apply_strategy(Net(5), bundle, force=True)
    with pytest.raises(StrategyError, match="other weights"):
        apply_strategy(Net(5), bundle)


@torch.no_grad()
def test_a_skipped_layer_may_be_anything() -> None:
    """Nonlinear in its weight, so it could not be searched; the strategy leaves it as it is."""

    class Squares(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.square().mean()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Squares(4, 4, 1), nn.Flatten(), nn.Linear(64, 3)).eval()
    batch = images(4)
    prepared = prepare(model, batch, skip=lambda name: name == "1")
    supernet = Supernet(prepared.model, small_space(skip=["1"]))
    supernet.calibrate([batch])
    with supernet.mode("discrete"):
        wanted = supernet(batch)
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch))
    assert torch.equal(applied(batch), wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype: torch.dtype) -> None:
    model, batch = cnn().to(dtype), images(4).to(dtype)
    prepared, supernet = prepared_supernet(model, batch, small_space(4))
    with supernet.mode("discrete"):
        wanted = supernet(batch)
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch))
    assert wanted.dtype == dtype and torch.equal(applied(batch), wanted)


@torch.no_grad()
def test_the_batch_need_not_have_the_recorded_size() -> None:
    model, batch = cnn(), images(4)
    prepared, supernet = prepared_supernet(model, batch, small_space(4))
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch[:1]))
    with supernet.mode("discrete"):
        assert torch.equal(applied(batch), supernet(batch))


class Branching(nn.Module):
    """Its batch norm follows the convolution only for inputs that are not too small."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.1, 9.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.abs().mean() > self.least:
            y = self.norm(y)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("least", [0.0, 2.0])
def test_what_was_folded_does_not_depend_on_the_inputs_that_apply_makes_up(least: float) -> None:
    inputs = 5 * torch.randn(12, 3, 6, 6)
    result = search_ptq(Branching(least).eval(), inputs, small_space(), PTQSettings(steps=2, batch_size=4))
    assignment = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(assignment):
        assert torch.equal(result.quantized()(inputs), result.supernet(inputs))
