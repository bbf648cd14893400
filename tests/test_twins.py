"""Options that come to the same: recognized to the bit, learned of together, never tried twice."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from dqss.decision import Decision, OneHot
from dqss.discretize import RefineSettings, refine
from dqss.effects import pool, potentials
from dqss.lit.mean_field import MeanField
from dqss.mixed import MixedWeight
from dqss.mixing import Codes, CodeStack, Grid, GridStack, mix_codes, mix_fake_quantize
from dqss.space import SearchSpace
from dqss.spec import PerChannel, QuantSpec
from dqss.supernet import Supernet
from tests.support.nets import evaluator_of, images


def twins() -> Decision:
    """Four options, of which the second and the last lead to the same."""
    made = Decision("d", ("a", "b", "c", "b again"))
    made.recognize([0, 1, 2, 1])
    return made


def test_alike_options_share_probability_margin_and_entropy() -> None:
    made = twins()
    made.logits.data = torch.tensor([0.3, -0.2, 0.1, 0.25])
    p = torch.softmax(made.logits.detach().double(), 0).numpy()
    outcomes = [p[0], p[1] + p[3], p[2]]
    np.testing.assert_allclose(made.probabilities(), [outcomes[0], outcomes[1], outcomes[2], outcomes[1]])
    assert made.margin() == pytest.approx(outcomes[1] - outcomes[0])
    assert made.entropy().item() == pytest.approx(scipy.stats.entropy(outcomes), rel=1e-6)


def test_nothing_to_decide_where_all_are_alike() -> None:
    made = Decision("d", ("a", "b"))
    made.recognize(["x", "x"])
    assert made.outcomes == 1 and made.margin() == 1.0 and made.entropy().item() == pytest.approx(0, abs=1e-7)
    assert made.probabilities() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("outcome", [[0, 1, 2, 1], [0, 1, 2, 3]])
def test_certainty_has_no_entropy_and_a_gradient_that_is_a_number(outcome: list[int]) -> None:
    made = twins()
    made.recognize(outcome)
    made.logits.data = torch.tensor([1e20, 0.0, -1e20, 3.0])
    entropy = made.entropy()
    entropy.backward()
    assert entropy.item() == 0.0
    assert made.logits.grad is not None and torch.equal(made.logits.grad, torch.zeros(4))


def test_set_outcomes_gives_their_distribution() -> None:
    made, wanted = twins(), torch.tensor([0.5, -1.0, 2.0]).double()
    made.set_outcomes(wanted)
    p = torch.softmax(wanted, 0).tolist()
    assert made.probabilities() == pytest.approx([p[0], p[1], p[2], p[1]], rel=1e-6)
    assert torch.equal(made.logits[1], made.logits[3])


def test_what_is_learned_of_alike_options_is_learned_of_one() -> None:
    """Sampled as four options or as three, a quadratic loss gives the same potentials."""
    generator = torch.Generator().manual_seed(4)
    errors = torch.randn(3, 5, generator=generator, dtype=torch.float64)[[0, 1, 2, 1]]
    slope = torch.randn(5, generator=generator, dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        mixed = weights @ errors
        return slope @ mixed + mixed.square().sum()

    losses = torch.stack([loss(row) for row in torch.eye(4, dtype=torch.float64)])
    gradients = torch.stack(
        [torch.autograd.functional.jacobian(loss, row) for row in torch.eye(4, dtype=torch.float64)]
    )
    counts = torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    sums = (gradients - gradients.diagonal()[:, None]) * counts[:, None]
    pooled, weights = pool(sums[None], counts[None], twins().outcome[None], 3)
    assert weights.tolist() == [[3.0, 6.0, 2.0]]
    wanted = losses[:3] - losses[:3].mean()
    torch.testing.assert_close(potentials(pooled, weights)[0], wanted, rtol=1e-8, atol=1e-8)


class Twofold:
    """Two decisions that matter alike; the options of ``plain`` are written down twice or thrice."""

    def __init__(self, copies: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.errors = [torch.randn(3, 6, generator=generator) for _ in range(2)]
        self.errors[1] = self.errors[1].repeat(copies, 1)
        self.decisions = [Decision(f"d{n}", list(range(len(e)))) for n, e in enumerate(self.errors)]
        self.decisions[1].recognize([k % 3 for k in range(3 * copies)])

    def run(self, steps: int) -> None:
        optimizer = MeanField(self.decisions, lambda done: 0.4)
        for step in range(steps):
            for n, decision in enumerate(self.decisions):  # the same outcomes, however they are written
                decision.relaxation = OneHot((step + n * (step // 3)) % 3)
            optimizer.zero_grad()
            total = sum((d.weights() @ e for d, e in zip(self.decisions, self.errors, strict=True)), 0)
            assert isinstance(total, Tensor)
            total.square().sum().backward()
            optimizer.step()


def test_writing_options_down_twice_changes_nothing() -> None:
    """... for none of the decisions: they anneal together, at one temperature."""
    plain, doubled = Twofold(1), Twofold(3)
    plain.run(12)
    doubled.run(12)
    for one, other in zip(plain.decisions, doubled.decisions, strict=True):
        assert one.entropy().item() == pytest.approx(other.entropy().item(), rel=1e-4)
        assert one.probabilities() == pytest.approx(other.probabilities()[:3], rel=1e-4)


def test_decisions_without_effect_do_not_hold_the_others_warm() -> None:
    """A dead decision has full entropy at every temperature; the others have what is asked for."""
    live, dead = Decision("live", (0, 1, 2)), Decision("dead", (0, 1, 2))
    optimizer = MeanField([live, dead], lambda done: 0.2)
    for step in range(9):
        live.relaxation = dead.relaxation = OneHot(step % 3)
        optimizer.zero_grad()
        (live.weights() @ torch.tensor([0.1, 0.5, 0.9])).backward()
        optimizer.step()
    assert live.entropy().item() / math.log(3) == pytest.approx(0.2, abs=1e-3)
    assert dead.entropy().item() / math.log(3) == pytest.approx(1.0)


def depthwise() -> tuple[Supernet, Tensor, SearchSpace]:
    from dqss.search_spaces.studies import eight

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())
    inputs, space = images(8), eight(4)
    supernet = Supernet(net, space)
    supernet.calibrate([inputs])
    return supernet, inputs, space


def test_percentiles_of_nine_values_are_recognized() -> None:
    """An option is alike another exactly where its weight is the same tensor."""
    supernet, _, _ = depthwise()
    layer = supernet.layers["2"]
    assert isinstance(layer.weight, MixedWeight)
    decision, count = layer.weight.decision, len(layer.weight.candidates)
    values = [layer.weight.stack.choose(k) for k in range(count)]
    outcome = decision.outcome.tolist()
    for a in range(count):
        for b in range(count):
            assert (outcome[a] == outcome[b]) == torch.equal(values[a], values[b])
    assert decision.outcomes < count
    assert decision.outcomes == len(set(outcome)) == max(outcome) + 1


def test_alike_inputs_are_of_one_grid() -> None:
    supernet, _, _ = depthwise()
    activation = supernet.layers["2"].activation
    assert activation is not None
    outcome = activation.decision.outcome.tolist()
    x = torch.relu(torch.randn(4, 6, 5, 5)) * 3
    results = [activation[k](x) for k in range(len(outcome))]
    for a in range(len(outcome)):
        for b in range(len(outcome)):
            if outcome[a] == outcome[b]:
                assert torch.equal(results[a], results[b])


def test_refinement_tries_no_option_that_is_alike_the_one_in_place() -> None:
    supernet, inputs, _ = depthwise()
    parts = {"search": range(8), "refine": range(8), "select": range(8)}
    evaluator: Any = evaluator_of(supernet, inputs, {k: list(v) for k, v in parts.items()})
    tried: list[dict[str, int]] = []
    measure_each = evaluator.measure_each

    def watch(assignment: dict[str, int], *rest: Any) -> list[float]:
        tried.append(dict(assignment))
        found: list[float] = measure_each(assignment, *rest)
        return found

    evaluator.measure_each = watch
    settings = RefineSettings(passes=1000, screen=8, alternatives=8, confidence=1e9)
    start = supernet.argmax()
    refine(evaluator, start, settings)
    outcomes = {name: d.outcome.tolist() for name, d in supernet.decisions.items()}
    seen = [tuple(outcomes[name][k] for name, k in sorted(found.items())) for found in tried[1:]]
    assert tuple(outcomes[name][k] for name, k in sorted(start.items())) not in seen
    assert len(set(seen)) == len(seen) == sum(d.outcomes - 1 for d in supernet.decisions.values())


def test_what_is_alike_is_computed_once_and_counts_for_all() -> None:
    """Mixtures of candidates, some written down twice, are those of stacks that keep every one."""
    torch.manual_seed(3)
    x, g = torch.randn(5, 7), torch.randn(5, 7)
    spec = QuantSpec(4, True, PerChannel(0))
    three = [Grid(torch.rand(5) + 0.1, torch.zeros(5), spec) for _ in range(3)]
    alike = [0, 1, 0, 3, 1]
    grids = [three[min(k, 2)] for k in alike]
    codes = CodeStack.of([Codes.of(x, grid) for grid in grids])
    merged = codes.merged(alike)
    assert len(merged.steps) == 3 and len(codes.steps) == 5
    whole, short = GridStack.of(grids, x.shape), GridStack.of(grids, x.shape, alike)
    assert len(short.scale) == 3
    for place in (None, *range(5)):
        hot = torch.softmax(torch.randn(5), 0) if place is None else torch.eye(5)[place]
        found = []
        for stack, kept in ((whole, codes), (short, merged)):
            leaf, a, b = (part.clone().requires_grad_() for part in (x, hot, hot))
            mixed, weight = mix_fake_quantize(leaf, a, stack, place), mix_codes(b, kept, place)
            (mixed * g).sum().backward()
            (weight * g).sum().backward()
            found.append((mixed, weight, leaf.grad, a.grad, b.grad))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
