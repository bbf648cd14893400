"""Decisions on networks of every shape: float mode changes nothing, every mode means what it says."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dqss.calls import call_model
from dqss.decision import Frozen, OneHot
from dqss.errors import NonFiniteError, SearchSpaceError
from dqss.mixed import Mode
from dqss.prepare import prepare
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, PerChannel, QuantSpec
from dqss.supernet import Supernet
from tests.support.nets import THREE, calibrated, cnn, every_other, images, output, small_space
from tests.support.zoo import NETWORKS, Attention, ReadsWeights, Tied, Twice


@pytest.fixture(params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, batch = NETWORKS[request.param]
    return make().eval(), batch()


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """Attention has a fused kernel that adds in another order; whoever has hooks does not take it."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@torch.no_grad()
@pytest.mark.usefixtures("no_fast_path")
def test_float_mode_is_the_original_network(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    supernet = calibrated(model, batch)
    before = output(model, batch)
    # Frozen like the supernet's: attention takes other kernels for weights that could learn.
    wanted = output(copy.deepcopy(model).requires_grad_(False), batch)
    assert torch.equal(output(supernet, batch), wanted)
    with supernet.mode("float"):
        assert torch.equal(output(supernet, batch), wanted)
    prepared = prepare(model, batch).model
    again = Supernet(prepared, small_space())
    again.calibrate([batch])
    torch.testing.assert_close(output(again, batch), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(output(model, batch), before)
    torch.testing.assert_close(before, wanted, rtol=1e-6, atol=1e-6)


def test_quantized_modes_do_the_same_with_and_without_gradients(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    supernet = calibrated(model, batch)
    plain = output(model, batch)
    for context in (lambda: supernet.mode("relaxed"), lambda: supernet.assign(every_other(supernet))):
        with context():
            wanted = output(supernet, batch)
            with torch.no_grad():
                found = output(supernet, batch)
            with torch.inference_mode():
                inferred = output(supernet, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inferred, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - plain).abs().max() > 1e-3


def test_every_decision_gets_a_gradient(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    supernet = calibrated(model, batch)
    with supernet.mode("relaxed"):
        output(supernet, batch).square().sum().backward()
    for name, decision in supernet.decisions.items():
        assert decision.logits.grad is not None and decision.logits.grad.abs().max() > 0, name
        # Shifting all logits changes nothing.
        assert abs(float(decision.logits.grad.sum())) <= 1e-3 * float(decision.logits.grad.abs().max()) + 1e-6
    assert all(parameter.grad is None for parameter in supernet.network_parameters())


def test_frozen_decisions_are_their_choice_alone(case: tuple[nn.Module, Any]) -> None:
    """Every second one: for the others nothing changes, neither the output nor a gradient."""
    model, batch = case
    supernet = calibrated(model, batch)
    decisions, assignment = supernet.decisions, every_other(supernet)
    with supernet.assign(assignment):
        wanted = output(supernet, batch)
    with supernet.pinned(assignment):
        output(supernet, batch).square().sum().backward()
    gradients = {name: decision.logits.grad for name, decision in decisions.items()}
    for number, (name, decision) in enumerate(decisions.items()):
        decision.relaxation = (OneHot, Frozen)[number % 2](assignment[name])
        decision.logits.grad = None
    with supernet.mode("relaxed"):
        found = output(supernet, batch)
    found.square().sum().backward()
    assert torch.equal(found, wanted)
    for number, (name, decision) in enumerate(decisions.items()):
        if number % 2:
            assert decision.frozen and decision.logits.grad is None
            assert decision.choice == decision.place() == assignment[name]
        else:
            assert torch.equal(decision.logits.grad, gradients[name]), name


def test_a_frozen_decision_can_still_be_assigned_and_pinned() -> None:
    """What comes after a search measures other options, and asks for their gradients."""
    supernet, batch = calibrated(cnn(), images(4)), images(3)
    assignment, other = every_other(supernet), every_other(supernet, 1)
    with supernet.assign(other):
        wanted = output(supernet, batch)
    for name, decision in supernet.decisions.items():
        decision.relaxation = Frozen(assignment[name])
    for context in (supernet.assign, supernet.pinned):
        with context(other):
            assert torch.equal(output(supernet, batch), wanted)
    with supernet.pinned(other):
        output(supernet, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in supernet.arch_parameters())
    with supernet.mode("relaxed"), supernet.assign(assignment):
        frozen = output(supernet, batch)
    with supernet.mode("relaxed"):
        assert torch.equal(output(supernet, batch), frozen) and not torch.equal(frozen, wanted)


def test_parameters_are_disjoint_and_exhaustive(case: tuple[nn.Module, Any]) -> None:
    supernet = calibrated(*case)
    arch, network = supernet.arch_parameters(), supernet.network_parameters()
    assert {id(p) for p in arch}.isdisjoint({id(p) for p in network})
    assert {id(p) for p in arch} | {id(p) for p in network} == {id(p) for p in supernet.parameters()}
    assert len(arch) + len(network) == len(list(supernet.parameters()))
    logits = {name for name, _ in supernet.named_parameters() if name.endswith("logits")}
    assert len(logits) == len(arch) == len(supernet.decisions)
    assert list(supernet.decisions) == sorted(supernet.decisions)
    assert [id(p) for p in arch] == [id(d.logits) for d in supernet.decisions.values()]
    assert all(p.requires_grad for p in arch) and not any(p.requires_grad for p in network)


def test_a_copy_is_whole_and_apart(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    supernet = calibrated(model, batch)
    twin = copy.deepcopy(supernet)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in supernet.parameters()})
    assignment = every_other(supernet)
    with supernet.assign(assignment):
        wanted = output(supernet, batch)
        with twin.mode("float"):
            assert torch.equal(output(supernet, batch), wanted)
    with twin.assign(assignment):
        assert torch.equal(output(twin, batch), wanted)
    with twin.assign(every_other(twin, 1)):
        assert not torch.equal(output(twin, batch), wanted)
    for parameter in twin.parameters():
        parameter.data.zero_()
    with supernet.assign(assignment):
        assert torch.equal(output(supernet, batch), wanted)


def test_assignment_beats_logits_and_is_undone() -> None:
    supernet, batch = calibrated(cnn(), images(4)), images(3)
    for decision in supernet.decisions.values():
        decision.logits.data.copy_(torch.tensor([1.0, 0.0]))
    with supernet.mode("discrete"):
        preferred = output(supernet, batch)
    with supernet.assign(dict.fromkeys(supernet.decisions, 0)):
        assert torch.equal(output(supernet, batch), preferred)
    with supernet.assign(dict.fromkeys(supernet.decisions, 1)):
        other = output(supernet, batch)
        with supernet.assign(dict.fromkeys(supernet.decisions, 0)):
            assert torch.equal(output(supernet, batch), preferred)
        assert torch.equal(output(supernet, batch), other)
    assert not torch.equal(other, preferred)
    with supernet.mode("discrete"):
        assert torch.equal(output(supernet, batch), preferred)
    assert supernet.argmax() == dict.fromkeys(supernet.decisions, 0)


def test_pinned_is_assigned_with_gradients() -> None:
    supernet, batch = calibrated(cnn(), images(4)), images(3)
    assignment = every_other(supernet)
    with supernet.assign(assignment):
        wanted = output(supernet, batch)
    with supernet.pinned(assignment):
        found = output(supernet, batch)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert all(p.grad is not None for p in supernet.arch_parameters())


def test_modes_and_choices_come_back_after_exceptions() -> None:
    supernet = calibrated(cnn(), images(4))
    relaxations = {name: d.relaxation for name, d in supernet.decisions.items()}
    wrong = torch.randn(2, 5, 6, 6)
    contexts = (
        lambda: supernet.mode("relaxed"),
        lambda: supernet.assign(every_other(supernet)),
        lambda: supernet.pinned(every_other(supernet)),
    )
    for context in contexts:
        with pytest.raises(RuntimeError), context():
            supernet(wrong)
    first = next(iter(supernet.decisions))
    for broken in (supernet.assign, supernet.pinned):
        with pytest.raises(KeyError), broken({first: 0, "no such decision": 1}):
            pass
    with pytest.raises(RuntimeError):
        supernet.calibrate([wrong])
    assert all(q.mode is Mode.FLOAT for q in supernet.quantizers())
    for name, decision in supernet.decisions.items():
        assert decision.assigned is None and decision.relaxation is relaxations[name]


def test_coverage_says_what_became_of_each_layer() -> None:
    twice = calibrated(Twice().eval(), torch.randn(5, 6))
    assert list(twice.layers) == ["shared", "head"]
    assert twice.coverage.unused == ["rare", "never"] and not twice.coverage.weight_only
    # ... and of one that only some batches reach
    some = calibrated(Twice().eval(), torch.randn(5, 6), 500 * torch.randn(5, 6))
    assert list(some.layers) == ["shared", "rare", "head"] and some.coverage.unused == ["never"]
    with some.mode("relaxed"):
        assert torch.isfinite(some(torch.randn(2, 6))).all()

    read = calibrated(ReadsWeights(), torch.randn(5, 6))
    assert read.coverage.weight_only == ["qkv"]
    assert read.layers["qkv"].weight is not None and read.layers["qkv"].activation is None

    attention = calibrated(Attention().eval(), torch.randn(2, 5, 8))
    assert attention.coverage.weight_only == ["attention.out_proj"]
    assert sorted(attention.decisions) == ["attention.out_proj.weight", "head.activation", "head.weight"]

    tied = calibrated(Tied(), torch.randint(0, 11, (3, 5)))
    assert tied.coverage.tied == [["first", "second"]]
    assert sorted(tied.decisions) == [
        "first.activation", "first.weight", "head.activation", "head.weight", "second.activation",
    ]  # fmt: skip

    channel = Candidate.of("minmax", QuantSpec(4, True, PerChannel(0)))
    weights = SearchSpace("w", (Rule((channel,)),))
    only = calibrated(Twice().eval(), torch.randn(5, 6), space=weights)
    assert only.coverage.unused == ["rare", "never"] and not only.coverage.weight_only
    inputs = SearchSpace("a", (Rule((), (channel,)),))
    only = calibrated(Twice().eval(), torch.randn(5, 6), space=inputs)
    assert only.coverage.unused == ["rare", "never"] and list(only.layers) == ["shared", "head"]


def test_unused_layers_are_left_as_they_were() -> None:
    model = Twice().eval()
    supernet = calibrated(model, torch.randn(5, 6))
    never = supernet.model.never
    assert type(never) is nn.Linear and not never._forward_pre_hooks
    x = torch.randn(2, 6)
    with supernet.mode("discrete"):
        assert torch.equal(never(x), model.never(x))


def test_tied_embedding_stays_float_while_the_head_is_quantized() -> None:
    model, tokens = Tied(), torch.arange(11)[None]
    supernet = calibrated(model, tokens)
    with supernet.mode("discrete"):
        assert torch.equal(supernet.model.embedding(tokens), model.embedding(tokens))
        assert not torch.equal(supernet.model.head.weight, model.head.weight)
        assert torch.equal(supernet.model.first.weight, supernet.model.second.weight)


def test_a_layer_used_twice_sees_the_range_of_both_uses() -> None:
    model, batch = Twice().eval(), torch.randn(64, 6)
    supernet = calibrated(model, batch, space=small_space(8, ["minmax"]))
    quantizer = supernet.layers["shared"].activation[0]
    inputs = torch.cat([batch, torch.relu(model.shared(batch)).detach()])
    width = max(float(inputs.max()), 0) - min(float(inputs.min()), 0)
    assert float(quantizer.scale) == pytest.approx(width / 255, rel=1e-5)


def test_padded_batches_of_an_encoder() -> None:
    """With a padding mask torch would turn the batch into nested tensors where no gradient is needed."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1:, 3:] = True
    batch = {"src": torch.randn(3, 5, 8), "src_key_padding_mask": mask}
    supernet = calibrated(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(
            call_model(supernet, batch)[~mask], call_model(model, batch)[~mask], rtol=1e-5, atol=1e-5
        )
    for mode in ("relaxed", "discrete"):
        with supernet.mode(mode):
            wanted = call_model(supernet, batch)
            with torch.no_grad():
                found = call_model(supernet, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activation_names_the_layer(value: float) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            h = self.body["first"](x)
            return self.body["second"](torch.where(h > h.median(), value, h))

    with pytest.raises(NonFiniteError, match=r"input of layer 'body.second': ") as caught:
        calibrated(Breaks(), torch.randn(3, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_constant_and_all_zero_channels_are_fine(granularity: str) -> None:
    names = [*THREE, "lp", "aciq_gaussian", "aciq_laplace"]
    space = small_space(4, names, weight_granularity=granularity, activation_granularity=granularity)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].weight[1] = 0.25
        model[0].bias[0] = 0.0
        model[2].weight.zero_()
    batch = images(4)
    batch[:, 0], batch[:, 1] = 0.0, 3.5
    supernet = calibrated(model, batch, space=space)
    with supernet.mode("relaxed"):
        assert torch.isfinite(supernet(batch)).all()
    for start in range(len(names)):
        with supernet.assign(every_other(supernet, start)):
            assert torch.equal(supernet(batch), model[2].bias.reshape(1, 2, 1, 1).expand(4, 2, 6, 6))
    first = supernet.layers["0"]
    with supernet.assign({"0.weight": 0}):
        assert (supernet.model[0].weight[0] == 0).all()
    if granularity == "channel":  # three bits and a sign: a constant is the last step but for rounding
        torch.testing.assert_close(first.weight[0](model[0].weight)[1], model[0].weight[1])


def test_skip_force_and_types() -> None:
    def names(**options: Any) -> tuple[list[str], list[str]]:
        supernet = calibrated(cnn(), images(2), space=small_space(**options))
        return list(supernet.layers), supernet.coverage.skipped

    assert names() == (["0", "3", "6"], [])
    assert names(skip=["0", "6"]) == (["3"], ["0", "6"])
    assert names(skip_types=["Conv2d"]) == (["6"], ["0", "3"])
    assert names(skip_types=["_ConvNd"], force=["3"]) == (["3", "6"], ["0"])
    with pytest.raises(SearchSpaceError, match=r"no layer matches"):
        names(skip=["7"])
    with pytest.raises(SearchSpaceError, match=r"did you mean 'Linear'"):
        names(skip_types=["linear"])
    with pytest.raises(SearchSpaceError, match="none of the model's 3 layers"):
        names(skip=["*"])


def test_a_network_that_uses_none_of_its_layers_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(SearchSpaceError, match="none of the layers under search is used"):
        calibrated(Idle(), torch.randn(2, 3))


def test_parametrized_weights_of_the_user_survive_underneath() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
    batch = torch.randn(3, 4)
    supernet = Supernet(prepare(model, batch).model, small_space())
    supernet.calibrate([batch])
    torch.testing.assert_close(supernet(batch), model(batch), rtol=1e-5, atol=1e-6)
    with supernet.mode("discrete"):
        assert len(supernet.model[0].weight.unique()) <= 4 * 8  # a grid of three bits a channel


def test_calibration_does_not_depend_on_how_the_inputs_are_cut() -> None:
    model, inputs = cnn(), images(12)
    whole, parts = calibrated(model, inputs), calibrated(model, *inputs.split(5))
    batch = images(4)
    for start in (0, 1):
        with whole.assign(every_other(whole, start)), parts.assign(every_other(parts, start)):
            torch.testing.assert_close(whole(batch), parts(batch), rtol=1e-5, atol=1e-5)


def test_moving_the_network_moves_the_codes() -> None:
    """The meta device stands for any other: nothing may be left behind."""
    supernet = calibrated(cnn(), images(4))
    assignment = every_other(supernet)
    supernet.to("meta")
    for context in (supernet.mode("relaxed"), supernet.assign(assignment)):
        with context:
            for layer in supernet.layers.values():
                assert layer.module.weight.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in supernet.state_dict().values())
