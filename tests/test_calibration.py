"""Squared gradients of random projections against Hessians that torch computes from the definition."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from dqss.discretize import RefineSettings
from dqss.errors import SearchSpaceError
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import Distance, KLDivergence, LumaSquaredError, MeanAbsoluteError, MeanSquaredError
from dqss.measure import PROBES
from dqss.observers import ALGORITHMS, Algorithm, Statistics
from dqss.observers.base import full_range
from dqss.prepare import fingerprint
from dqss.space import SearchSpace
from dqss.spec import QuantSpec
from dqss.supernet import Supernet
from tests.support.nets import cnn, images, small_space


@dataclass(frozen=True)
class Recorder(Algorithm):
    """Min-max that remembers what it was shown, by the number of values in it."""

    name: ClassVar[str] = "recorder"
    needs_gradients: ClassVar[bool] = True
    shown: ClassVar[list[Statistics]] = []

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        for c in range(len(stats.minimum)):  # tensors that are alike come side by side, a channel each
            self.shown.append(stats.channels(torch.arange(len(stats.minimum)) == c))
        return full_range(stats, spec)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Statistics]]:
    """Calibrates a network layer by layer; statistics of activations first, then of weights."""
    monkeypatch.setitem(ALGORITHMS, "recorder", Recorder)

    def calibrate(model: nn.Module, probes: list[Any], distance: Distance | None = None) -> list[Statistics]:
        Recorder.shown.clear()
        supernet = Supernet(model, small_space(8, ["recorder"], weight_granularity="tensor"))
        supernet.calibrate(probes[:1], probes=probes, distance=distance)
        return list(Recorder.shown)

    return calibrate


def diagonal(distance: Distance, run: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Of the Hessian of the distance to the output at ``at``, in fp64."""
    reference = run(at.double()).detach()
    full = hessian(lambda x: distance.per_sample(run(x), reference).sum())(at.double())
    return full.reshape(at.numel(), at.numel()).diagonal()


def of_values(stats: Statistics, values: Tensor, probes: int) -> Tensor:
    """The importance at each of ``values`` (all distinct), a mean over the probes."""
    nearest = (stats.values[0][:, None] - values.flatten()).abs()
    nearest = nearest.masked_fill((stats.counts[0] == 0)[:, None], torch.inf).argmin(dim=0)
    assert stats.importance is not None and len(set(nearest.tolist())) == values.numel()
    return stats.importance[0][nearest] / probes


KL_AND_MSE = itertools.product([KLDivergence(), MeanSquaredError()], [(1, 4), (2, 3), (1, 2, 3)])


@pytest.mark.parametrize(
    ("distance", "shape"),
    [*KL_AND_MSE, (LumaSquaredError(), (1, 3, 2, 1))],
    ids=lambda value: getattr(value, "name", None),
)
def test_projections_have_the_hessian_of_the_distance_as_covariance(
    distance: Distance, shape: tuple[int, ...]
) -> None:
    reference = 2 * torch.randn(shape).double()
    count = reference.numel()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=count))).double()
    vectors = torch.stack([distance.curvature_root(reference, s.view(shape)).flatten() for s in signs])
    covariance = vectors.T @ vectors / len(signs)
    exact = hessian(lambda x: distance.per_sample(x, reference).sum())(reference).reshape(count, count)
    factor = covariance.trace() / exact.trace()
    torch.testing.assert_close(covariance, factor * exact, rtol=1e-9, atol=1e-12)


def test_distances_without_a_hessian_use_the_identity() -> None:
    signs = torch.randn(3, 4).sign()
    assert torch.equal(MeanAbsoluteError().curvature_root(torch.randn(3, 4), signs), signs)


MANY = 1500  # the mean of as many squares is off by some 4 %


@pytest.mark.parametrize("distance", [None, MeanSquaredError()], ids=["kl by default", "mse"])
def test_importance_is_the_diagonal_of_the_hessian(
    recorded: Callable[..., list[Statistics]], distance: Distance | None
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    x = torch.randn(1, 4)
    first, second, weight, last = recorded(model, [x] * MANY, distance)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    layers = dict(model.named_modules())
    weights = {name: layers[name].parametrizations.weight.original.double() for name in ("0", "2")}  # type: ignore[union-attr]
    biases = {f"{name}.bias": layers[name].bias.double() for name in ("0", "2")}

    def run(inputs: Tensor, **changed: Tensor) -> Tensor:
        state = {f"{name}.weight": w for name, w in weights.items()} | biases | changed
        return functional_call(plain, state, (inputs,))

    kind = distance or KLDivergence()
    hidden = torch.tanh(x.double() @ weights["0"].T + biases["0.bias"])
    exact = [
        (first, x, diagonal(kind, run, x)),
        (second, hidden, diagonal(kind, lambda h: h @ weights["2"].T + biases["2.bias"], hidden)),
        (weight, weights["0"], diagonal(kind, lambda w: run(x.double(), **{"0.weight": w}), weights["0"])),
        (last, weights["2"], diagonal(kind, lambda w: run(x.double(), **{"2.weight": w}), weights["2"])),
    ]
    factor = 1.0 if distance is None else 3 / 2  # the mean over three squares
    for stats, values, wanted in exact:
        found = of_values(stats, values, MANY)
        torch.testing.assert_close(found, factor * wanted, rtol=0.2, atol=1e-3 * float(wanted.max()))


class Shared(nn.Module):
    """One tensor read by two layers, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + 0.1 * self.b(x))


def test_each_reader_of_a_tensor_and_each_use_of_a_weight_count_as_they_should(
    recorded: Callable[..., list[Statistics]],
) -> None:
    model, x, kind = Shared(), torch.randn(1, 3), MeanSquaredError()
    read_a, read_b, weight_a, weight_b = recorded(model, [x] * MANY, kind)
    a, b = (m.parametrizations.weight.original.double() for m in (model.a, model.b))  # type: ignore[union-attr]
    x = x.double()

    def run(by_a: Tensor = x, by_b: Tensor = x, wa: Tensor = a, wb: Tensor = b) -> Tensor:
        return (torch.tanh(by_a @ wa.T) + 0.1 * (by_b @ wb.T)) @ wb.T

    inner = torch.tanh(x @ a.T) + 0.1 * (x @ b.T)
    exact = [
        (read_a, x, diagonal(kind, lambda v: run(by_a=v), x)),
        (read_b, x, diagonal(kind, lambda v: run(by_b=v), x)),
        (read_b, inner, diagonal(kind, lambda v: v @ b.T, inner)),
        (weight_a, a, diagonal(kind, lambda w: run(wa=w), a)),
        (weight_b, b, diagonal(kind, lambda w: run(wb=w), b)),
    ]
    for stats, values, wanted in exact:
        found = of_values(stats, values, MANY)
        torch.testing.assert_close(found, 1.5 * wanted, rtol=0.2, atol=1e-3 * float(wanted.max()))


def test_sums_over_a_batch_are_sums_over_its_images(recorded: Callable[..., list[Statistics]]) -> None:
    x = torch.randn(300, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def again() -> nn.Module:
        twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
        twin.load_state_dict(state)
        return twin

    alone = recorded(again(), list(x.split(1)) * 4)
    together = recorded(again(), list(x.split(10)) * 4)
    for one, many in zip(alone[2:], together[2:], strict=True):
        assert one.importance is not None and many.importance is not None
        ratio = float(many.importance.sum() / one.importance.sum())
        assert ratio == pytest.approx(1, abs=0.35)  # 120 projections


def test_the_network_is_left_as_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.relu(self.b(y)).flatten(1)
            y.add_(1.0)  # after a layer has read it
            return z + y.mean()

    model, batch = InPlace().eval(), images(2)
    wanted, before = model(batch), fingerprint(model)
    parameters = list(model.parameters())
    supernet = Supernet(model, small_space(8, ["hessian"]))
    with torch.no_grad():
        supernet.calibrate([batch], probes=[batch[:1], batch[1:]])
    for layer in (model.a, model.b):
        importance = layer.parametrizations.weight[0]._importance  # type: ignore[union-attr, index]
        assert importance is None  # not kept longer than needed
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert all(not q.scale.requires_grad for m in supernet.quantizers() for q in m.candidates)
    with supernet.mode("float"):
        assert torch.equal(supernet(batch), wanted)
    assert len(before) == 4 and not model.training


def test_probes_are_used_only_where_needed_and_then_required() -> None:
    def never() -> Iterator[Any]:
        raise AssertionError("the second pass was made")
        yield

    supernet = Supernet(cnn(), small_space(3))
    assert not supernet.needs_gradients
    supernet.calibrate([images(2)], probes=never())
    supernet = Supernet(cnn(), small_space(3, ["minmax", "hessian"]))
    assert supernet.needs_gradients
    with pytest.raises(
        SearchSpaceError, match=r"'uniform' has candidates that need gradients: give"
    ) as caught:
        supernet.calibrate([images(2)])
    assert "\n" not in str(caught.value)


def test_a_network_that_hides_its_gradients_is_calibrated_as_by_mse() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.fc(x)

    model, batch = Hidden(), torch.randn(20, 5)
    supernet = Supernet(model, small_space(3, ["hessian", "mse"]))
    supernet.calibrate([batch], probes=[batch])
    for quantizer in supernet.quantizers():
        assert torch.equal(quantizer[0].scale, quantizer[1].scale)


QUICK = PTQSettings(steps=2, batch_size=8, refine=RefineSettings(passes=0), discrete_every=0)


def space_of(*algorithms: str) -> SearchSpace:
    return small_space(3, algorithms)


@pytest.mark.parametrize("count", [40, 150])
def test_three_evaluations_a_probe_are_counted(count: int) -> None:
    torch.manual_seed(3)
    model, inputs = cnn(), images(count)
    spent = [
        search_ptq(model, inputs, space_of("minmax", other), QUICK).metrics["evaluations"]
        for other in ("hessian", "mse")
    ]
    known = count - round(PTQSettings().parts[1] * count)
    assert spent[0] - spent[1] == 3 * min(PROBES, known)


def test_errors_that_do_not_matter_are_not_weighed() -> None:
    """Large weights that nobody reads stretch the range of every other algorithm."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    with torch.no_grad():
        model[0].weight[8:] *= 60
        model[2].weight[:, 8:] = 0
    inputs = torch.randn(64, 16)
    space = small_space(4, ["mse", "hessian"], weight_granularity="tensor")
    supernet = Supernet(model, space)
    with torch.no_grad():
        reference = model(inputs)
    supernet.calibrate([inputs], probes=inputs.split(1))
    errors = []
    for option in (0, 1):
        assignment = dict.fromkeys(supernet.decisions, 1) | {"0.weight": option}
        with torch.no_grad(), supernet.assign(assignment):
            errors.append(float(KLDivergence()(supernet(inputs), reference)))
    assert errors[1] < 0.2 * errors[0]
