"""Measurements against the definition; first-order effects against finite differences."""

from dataclasses import dataclass

import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from dqss.decision import Relaxation
from dqss.losses import MeanSquaredError
from dqss.measure import Evaluator, measure_stream
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec
from tests.support.nets import calibrated, cnn, evaluator_of, every_other, images, small_space

PARTS = {"search": [0, 1, 2], "refine": [9, 3, 7, 5, 4, 6], "select": [8, 10]}


def ready() -> tuple[Evaluator, Tensor]:
    inputs = images(11)
    return evaluator_of(calibrated(cnn(), inputs), inputs, PARTS), inputs


def mean_kl(evaluator: Evaluator, inputs: Tensor, assignment: dict[str, int], indices: list[int]) -> float:
    """In fp64, one image at a time."""
    total = 0.0
    for index in indices:
        with torch.no_grad():
            wanted = evaluator.supernet(inputs[index : index + 1])[0].double()
            with evaluator.supernet.assign(assignment):
                found = evaluator.supernet(inputs[index : index + 1])[0].double()
        total += scipy.stats.entropy(*(scipy.special.softmax(t.numpy()) for t in (wanted, found)))
    return total / len(indices)


def test_distance_is_the_mean_over_the_part() -> None:
    evaluator, inputs = ready()
    for start in (0, 1):
        assignment = every_other(evaluator.supernet, start)
        for part, indices in PARTS.items():
            wanted = mean_kl(evaluator, inputs, assignment, indices)
            assert evaluator.measure(assignment, part) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        wanted = mean_kl(evaluator, inputs, assignment, PARTS["refine"][:3])
        assert evaluator.measure(assignment, "refine", 3) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        everything = evaluator.measure(assignment, "refine", 99)
        assert everything == evaluator.measure(assignment, "refine")


def test_what_was_measured_is_not_run_again_but_counted() -> None:
    evaluator, _ = ready()
    runs: list[int] = []
    evaluator.supernet.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    assignment = every_other(evaluator.supernet)
    first = evaluator.measure(assignment, "refine")
    assert sum(runs) == 12 and evaluator.meter.evaluations == 12  # six float references, six quantized
    assert evaluator.measure(dict(reversed(assignment.items())), "refine") == first
    assert sum(runs) == 12 and evaluator.meter.evaluations == 18
    evaluator.measure(assignment, "refine", 2)
    assert sum(runs) == 14  # other images, but their references are known
    assert max(runs) <= evaluator.forward_size


def test_soft_distance_follows_the_logits() -> None:
    evaluator, _ = ready()
    assignment = every_other(evaluator.supernet)
    for name, decision in evaluator.supernet.decisions.items():
        decision.logits.data[assignment[name]] = 60.0
    assert evaluator.measure_soft("refine") == evaluator.measure(assignment, "refine")
    for decision in evaluator.supernet.decisions.values():
        decision.logits.data.zero_()
    assert evaluator.measure_soft("refine") != evaluator.measure(assignment, "refine")


@dataclass(frozen=True)
class Fixed(Relaxation):
    """Given mixture weights."""

    values: tuple[float, ...]

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        return torch.tensor(self.values)


def smooth_network() -> tuple[nn.Module, SearchSpace]:
    """Rounding has no derivative: only the first layer's input is rounded, and all weights."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    model[4].weight.data *= 10  # logits that differ, so that effects are far above fp32 noise

    def grids(granularity: PerChannel | PerTensor) -> tuple[Candidate, ...]:
        return (
            Candidate.of("minmax", QuantSpec(3, True, granularity)),
            Candidate.of("percentile", QuantSpec(3, True, granularity), {"p": 60.0}),
            Candidate.of("mse", QuantSpec(2, True, granularity)),
        )

    weights, inputs = grids(PerChannel(0)), grids(PerTensor())
    rules = (Rule(weights, inputs, names=("0",)), Rule(weights))
    return model, SearchSpace("smooth", rules)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_first_order_effects_are_the_derivatives_along_the_mixture(start: int) -> None:
    model, space = smooth_network()
    inputs = torch.randn(8, 6)
    evaluator = evaluator_of(calibrated(model, inputs, space=space), inputs, {"refine": list(range(8))})
    supernet = evaluator.supernet
    assignment = every_other(supernet, start)
    effects = evaluator.first_order(assignment, "refine")
    assert set(effects) == {"0.activation", "0.weight", "2.weight", "4.weight"}
    step = 0.02

    def soft(name: str, toward: int, amount: float) -> float:
        for other, decision in supernet.decisions.items():
            mixture = [float(k == assignment[other]) for k in range(3)]
            if other == name:
                mixture[assignment[name]] -= amount
                mixture[toward] += amount
            decision.relaxation = Fixed(tuple(mixture))
        return evaluator.measure_soft("refine")

    for name, effect in effects.items():
        assert effect[assignment[name]] == 0
        for k in range(3):
            slope = (soft(name, k, step) - soft(name, k, -step)) / (2 * step)
            # fp32 noise of the loss over the step, and the third derivative
            assert float(effect[k]) == pytest.approx(slope, rel=0.02, abs=1e-3)
    assert max(float(effect.abs().max()) for effect in effects.values()) > 0.05


def test_first_order_effects_forget_earlier_gradients_and_count_as_backward() -> None:
    evaluator, _ = ready()
    assignment = every_other(evaluator.supernet)
    evaluator.reference(PARTS["refine"])
    before = evaluator.meter.evaluations
    clean = evaluator.first_order(assignment, "refine")
    assert evaluator.meter.evaluations - before == 3 * 6
    for decision in evaluator.supernet.decisions.values():
        decision.logits.grad = torch.full_like(decision.logits, 7.0)
        decision.logits.grad[0] = -100.0
    again = evaluator.first_order(assignment, "refine")
    assert all(torch.equal(clean[name], again[name]) for name in clean)
    assert all(decision.logits.grad is None for decision in evaluator.supernet.decisions.values())


def test_first_order_effect_of_what_is_not_reached_is_zero() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) < 100 else self.b(x)

    inputs = torch.randn(6, 4)
    inputs[5] += 1000
    supernet = calibrated(Branch(), inputs[:5], inputs[5:])
    evaluator = evaluator_of(supernet, inputs, {"refine": [0, 1, 2]})
    effects = evaluator.first_order(dict.fromkeys(supernet.decisions, 0), "refine")
    assert (effects["b.weight"] == 0).all() and (effects["a.weight"] != 0).any()


def test_stream_measures_all_variants_in_one_pass() -> None:
    evaluator, inputs = ready()
    supernet, labels = evaluator.supernet, torch.randint(0, 4, (11,))
    assignment = every_other(supernet)
    loader = [(x, y) for x, y in zip(inputs.split(4), labels.split(4), strict=True)]
    variants = {
        "itself": None,
        "float": lambda: supernet.mode("float"),
        "chosen": lambda: supernet.assign(assignment),
    }
    metric = lambda: MulticlassAccuracy(4, average="micro")  # noqa: E731
    distance = MeanSquaredError()
    rows = measure_stream(supernet, iter(loader), variants, distance, metric, torch.device("cpu"))
    with torch.no_grad():
        reference = supernet(inputs)
        with supernet.assign(assignment):
            chosen = supernet(inputs)
    assert rows["float"]["distance"] == 0 and rows["float"]["count"] == rows["chosen"]["count"] == 11
    assert rows["chosen"]["distance"] == pytest.approx(float((chosen - reference).square().mean()), rel=1e-5)
    assert rows["itself"] == rows["float"]
    for name, logits in (("float", reference), ("chosen", chosen)):
        assert rows[name]["metric"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    unlabelled = [(x, None) for x, _ in loader]
    rows = measure_stream(supernet, unlabelled, variants, distance, metric, torch.device("cpu"))
    assert "metric" not in rows["chosen"]


def test_small_space_is_distinguishable() -> None:
    """The tests above compare candidates that differ."""
    evaluator, _ = ready()
    names = list(evaluator.supernet.decisions)
    base = dict.fromkeys(names, 0)
    scores = {evaluator.measure({**base, name: 1}, "refine") for name in names}
    assert len(scores | {evaluator.measure(base, "refine")}) == len(names) + 1
    assert len(small_space().rules) == 1
