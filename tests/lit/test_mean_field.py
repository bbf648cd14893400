"""Mean-field annealing: what a step learns, where it ends, and that it can be interrupted."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqss.budget import Budget, Limits
from dqss.budget.cost import SumCost
from dqss.budget.solve import Limit
from dqss.budget.steer import Steering
from dqss.decision import Decision, Frozen, Sampled
from dqss.effects import ONE_SIDED, logits_of_entropy, potentials
from dqss.errors import NonFiniteError, UserError
from dqss.lit.mean_field import MeanField
from dqss.lit.schedules import MeanFieldSchedule, Schedule, SoftmaxSchedule
from dqss.lit.settings import PTQSettings
from dqss.sensitivity import Estimates


class Quadratic:
    """A loss of D decisions with K options: second order in the sum of the errors they put in."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.errors = [torch.randn(k, 6, generator=generator) for k in sizes]
        self.decisions = [Decision(f"d{n}", list(range(k))) for n, k in enumerate(sizes)]
        for decision in self.decisions:
            decision.relaxation = Sampled()

    def __call__(self, weights: list[Tensor]) -> Tensor:
        total = sum((w @ e for w, e in zip(weights, self.errors, strict=True)), torch.zeros(6))
        return total.square().sum()

    def at(self, choice: Sequence[int]) -> float:
        return float(self([torch.eye(len(e))[k] for e, k in zip(self.errors, choice, strict=True)]))

    def best(self) -> tuple[int, ...]:
        return min(itertools.product(*(range(len(e)) for e in self.errors)), key=self.at)

    def run(self, optimizer: MeanField, steps: int, begin: int = 0) -> None:
        for step in range(begin, steps):
            generator = torch.Generator().manual_seed(step)
            for decision in self.decisions:
                decision.draw(generator)
            optimizer.zero_grad()
            self([decision.weights() for decision in self.decisions]).backward()
            optimizer.step()

    def choice(self) -> tuple[int, ...]:
        return tuple(decision.choice for decision in self.decisions)


def falling(steps: int) -> Callable[[int], float]:
    return lambda done: max(1e-3, 0.999 * (1 - done / steps))


@pytest.mark.parametrize("seed", range(6))
def test_without_interaction_it_finds_the_best_of_all_combinations(seed: int) -> None:
    problem = Quadratic((4, 3, 2, 4), seed)
    for n, errors in enumerate(problem.errors):  # each in a dimension of its own
        problem.errors[n] = errors[:, :1] * torch.eye(6)[n]
    problem.run(MeanField(problem.decisions, falling(200), memory=0.99), 200)
    assert problem.choice() == problem.best()


def test_with_interaction_it_beats_what_suits_each_alone() -> None:
    """Errors of different decisions can cancel each other, which none of them sees by itself."""
    gains = []
    for seed in range(6):
        problem = Quadratic((4, 4, 4, 4), seed)
        alone = [int(errors.square().sum(1).argmin()) for errors in problem.errors]
        problem.run(MeanField(problem.decisions, falling(300), memory=0.98), 300)
        gains.append(problem.at(alone) - problem.at(problem.choice()))
    assert min(gains) > -1e-6 and sum(gain > 0 for gain in gains) >= 4


def test_what_one_step_learns() -> None:
    problem = Quadratic((3, 2), seed=1)
    optimizer = MeanField(problem.decisions, lambda done: 0.5, memory=0.9)
    problem.run(optimizer, 1)
    generator = torch.Generator().manual_seed(0)
    for decision in problem.decisions:
        decision.logits.data.zero_()
        decision.draw(generator)
    drawn = [int(decision.noise.argmax()) for decision in problem.decisions]
    places = [torch.eye(3)[drawn[0]].requires_grad_(), torch.eye(2)[drawn[1]].requires_grad_()]
    gradients = torch.autograd.grad(problem(places), places)
    for decision, place, gradient in zip(problem.decisions, drawn, gradients, strict=True):
        sums = torch.zeros(len(gradient), len(gradient))
        sums[place] = gradient - gradient[place]
        counts = torch.zeros(len(gradient))
        counts[place] = 1
        torch.testing.assert_close(
            optimizer.effects(decision), potentials(sums[None], counts[None])[0], rtol=1e-5, atol=1e-5
        )


def test_logits_follow_the_effects_at_one_temperature() -> None:
    problem = Quadratic((3, 4, 3), seed=5)
    optimizer = MeanField(problem.decisions, lambda done: 0.3, memory=0.99)
    problem.run(optimizer, 20)
    effects = [optimizer.effects(decision)[None] for decision in problem.decisions]
    for decision, wanted in zip(problem.decisions, logits_of_entropy(effects, 0.3), strict=True):
        torch.testing.assert_close(decision.logits.detach(), wanted[0].float(), rtol=1e-4, atol=1e-4)


def test_a_frozen_decision_stays_and_leaves_the_others_their_temperature() -> None:
    problem = Quadratic((3, 4, 3), seed=5)
    optimizer = MeanField(problem.decisions, lambda done: 0.5 if done <= 20 else 0.3, memory=0.9)
    problem.run(optimizer, 20)
    frozen = problem.decisions[1]
    frozen.relaxation = Frozen(frozen.choice)
    before = [d.logits.detach().clone() for d in problem.decisions]
    known = optimizer.effects(frozen)
    problem.run(optimizer, 30, begin=20)
    assert torch.equal(frozen.logits, before[1]) and torch.equal(optimizer.effects(frozen), known)
    assert float(optimizer.state[frozen.logits]["counts"].sum()) == pytest.approx((1 - 0.9**20) / 0.1)
    effects = [optimizer.effects(decision)[None] for decision in problem.decisions]
    wanted = logits_of_entropy(effects, 0.3)
    for number in (0, 2):
        logits = problem.decisions[number].logits.detach()
        torch.testing.assert_close(logits, wanted[number][0].float(), rtol=1e-4, atol=1e-4)
        assert not torch.equal(logits, before[number])


def test_weight_of_the_past_is_a_geometric_series() -> None:
    problem = Quadratic((3,), seed=2)
    optimizer = MeanField(problem.decisions, lambda done: 0.9, memory=0.1)
    problem.run(optimizer, 12)
    counts = optimizer.state[problem.decisions[0].logits]["counts"]
    assert float(counts.sum()) == pytest.approx(1 / (1 - 0.1), rel=1e-4)


def test_its_state_survives_an_interruption() -> None:
    whole, first, second = (Quadratic((4, 3), seed=7) for _ in range(3))
    whole.run(MeanField(whole.decisions, falling(40)), 40)
    half = MeanField(first.decisions, falling(40))
    first.run(half, 17)
    again = MeanField(second.decisions, falling(40))
    again.load_state_dict(half.state_dict())
    for a, b in zip(first.decisions, second.decisions, strict=True):
        b.logits.data.copy_(a.logits.data)
    second.run(again, 40, begin=17)
    for a, b in zip(whole.decisions, second.decisions, strict=True):
        assert torch.equal(a.logits, b.logits)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    one, other = Quadratic((4, 3), seed=3), Quadratic((4, 3), seed=3)
    other.errors = [1024 * e for e in other.errors]
    for problem in (one, other):
        problem.run(MeanField(problem.decisions, falling(60)), 60)
    for a, b in zip(one.decisions, other.decisions, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-3, atol=1e-3)


def test_entropy_falls_as_the_schedule_says() -> None:
    problem = Quadratic((8, 8, 5), seed=0)
    steps = 50
    schedule = MeanFieldSchedule(entropy=0.9, final_entropy=0.1, reheats=0)
    optimizer = schedule.optimizer(problem.decisions, steps, learning_rate=1.0)["optimizer"]
    for step in range(steps):
        problem.run(optimizer, step + 1, begin=step)
        shares = [float(d.entropy().detach()) / math.log(len(d.options)) for d in problem.decisions]
        wanted = 0.9 + (0.1 - 0.9) * (step + 1) / steps
        assert sum(shares) / 3 == pytest.approx(wanted, abs=2e-3)


def test_entropy_falls_again_from_a_lower_one() -> None:
    problem = Quadratic((8, 8, 5), seed=0)
    steps = 60
    schedule = MeanFieldSchedule(0.9, 0.1, reheats=2, reheat_entropy=0.4, reheat_steps=7)
    assert schedule.cold(steps) == [46, 53, 60]
    optimizer = schedule.optimizer(problem.decisions, steps, learning_rate=1.0)["optimizer"]
    for step in range(steps):
        problem.run(optimizer, step + 1, begin=step)
        shares = [float(d.entropy().detach()) / math.log(len(d.options)) for d in problem.decisions]
        done = step + 1
        if done < 46:
            wanted = 0.9 - 0.8 * done / 46
        else:  # what is wanted until the next step: at 46 and 53 it has begun anew
            wanted = 0.1 if done == steps else 0.4 - 0.3 * ((done - 46) % 7) / 7
        assert sum(shares) / 3 == pytest.approx(wanted, abs=2e-3)


@given(st.integers(1, 4000), st.integers(0, 5), st.integers(1, 200))
def test_falls_fill_all_steps_and_the_first_is_the_longest(steps: int, reheats: int, length: int) -> None:
    cold = MeanFieldSchedule(reheats=reheats, reheat_steps=length).cold(steps)
    assert cold[-1] == steps and cold[0] >= 0.75 * steps
    assert len(cold) == 1 + (reheats if reheats * length <= steps / 4 else 0)
    assert all(after - before == length for before, after in itertools.pairwise(cold))


@pytest.mark.parametrize("field", ["longest_memory", "reheats", "reheat_steps"])
def test_counts_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"schedule\.{field}=-1: expected [01] or more"):
        MeanFieldSchedule(**{field: -1})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_stops_it(bad: float) -> None:
    problem = Quadratic((3, 2), seed=0)
    optimizer = MeanField(problem.decisions, lambda done: 0.5)
    problem.run(optimizer, 2)
    problem.decisions[1].logits.grad = torch.tensor([bad, 0.0])
    with pytest.raises(NonFiniteError, match="decision 'd1' is NaN or infinite at step 2"):
        optimizer.step()


def test_memory_is_a_share_of_the_steps_up_to_a_limit() -> None:
    decisions = [Decision("d", (0, 1))]
    cases = ((100, 0.5, 0.98), (2, 0.1, 0.0), (300, 2.0, 1 - 1 / 360), (1200, 0.67, 1 - 1 / 360))
    for steps, memory, factor in cases:
        made = MeanFieldSchedule(memory=memory).optimizer(decisions, steps, 0.1)["optimizer"]
        assert made.param_groups[0]["memory"] == pytest.approx(factor)


def test_a_memory_too_short_for_the_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.memory=0.05: expected a share of the steps, 0.1 or more"):
        MeanFieldSchedule(memory=0.05)


@pytest.mark.parametrize("field", ["entropy", "final_entropy", "reheat_entropy", "memory"])
@pytest.mark.parametrize("bad", [0.0, -0.1, math.inf, math.nan])
def test_shares_out_of_range_are_refused(field: str, bad: float) -> None:
    with pytest.raises(UserError, match=f"schedule.{field}="):
        MeanFieldSchedule(**{field: bad})


def informed(problem: Quadratic, effects: Sequence[Tensor]) -> MeanField:
    """With the noise of every switch known exactly, and some estimates of the effects."""
    noise = [(e[:, None] - e).square().sum(-1).double() for e in problem.errors]
    names = [decision.name for decision in problem.decisions]
    estimates = Estimates(*(dict(zip(names, rows, strict=True)) for rows in (effects, noise)))
    sizes = {d.name: len(d.options) for d in problem.decisions}
    free = Limits(sizes, [Limit(SumCost("none", "", {}), 1.0)])
    return MeanField(problem.decisions, lambda done: 0.9, 1.0, Steering(problem.decisions, free, estimates))


def test_estimates_are_known_before_the_first_sample() -> None:
    problem = Quadratic((4, 3), seed=1)
    effects = [torch.randn(len(d.options)).double() for d in problem.decisions]
    optimizer = informed(problem, effects)
    for decision, wanted in zip(problem.decisions, effects, strict=True):
        torch.testing.assert_close(optimizer.effects(decision), wanted - wanted.mean())


def test_with_noise_known_one_option_in_place_tells_the_effects_of_all() -> None:
    """Without interaction samples of one option say exactly what is estimated, or correct it."""
    problem = Quadratic((4,), seed=2)
    truth = problem.errors[0].square().sum(-1).double()
    for effects, exact in ((truth, True), (torch.zeros(4).double(), False)):
        optimizer = informed(problem, [effects])
        (decision,) = problem.decisions
        decision.relaxation = Sampled()
        with torch.no_grad():
            decision.logits.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))  # the second one, always
        for step in range(200):
            decision.draw(torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            problem([decision.weights()]).backward()  # type: ignore[no-untyped-call]
            optimizer._learn()
        found, wanted = optimizer.effects(decision), truth - truth.mean()
        if exact:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert (found - wanted).norm() < 0.7 * wanted.norm()


@pytest.mark.parametrize(
    ("budget", "schedule", "steps"),
    [
        (None, MeanFieldSchedule(), 600),
        (Budget(), MeanFieldSchedule(), 600),
        (Budget(size_mb=1), MeanFieldSchedule(), 100),
        (Budget(size_mb=1), SoftmaxSchedule(), 600),
    ],
)
def test_a_search_that_begins_from_estimates_takes_fewer_steps(
    budget: Budget | None, schedule: Schedule, steps: int
) -> None:
    assert PTQSettings(budget=budget, schedule=schedule).steps_at(4) == steps
    assert PTQSettings(budget=budget, schedule=schedule, steps=7).steps_at(4) == 7


def test_no_search_within_a_budget_is_easy() -> None:
    """Eight bits or sixteen is a choice like any other."""
    free, bound = PTQSettings(), PTQSettings(budget=Budget(size_mb=1))
    assert free.at(8).refine.passes == 0 and free.at(8).screen_first
    assert bound.at(8) == bound.at(4)
    assert bound.at(8).refine.passes == free.at(4).refine.passes and not bound.at(8).screen_first


def test_it_begins_with_what_was_shown() -> None:
    """Before any sample: effects as they were shown, logits in their order at the entropy wanted."""
    problem = Quadratic((4, 3), 0)
    shown = {"d0": torch.tensor([0.5, -1.0, 2.0, 0.0]).double(), "d1": torch.tensor([0.1, 0.0, 0.2]).double()}
    optimizer = MeanField(problem.decisions, lambda done: 0.4, shown=shown)
    entropies = []
    for decision in problem.decisions:
        effect = shown[decision.name]
        torch.testing.assert_close(optimizer.effects(decision), effect - effect.mean())
        p = torch.softmax(decision.logits.detach().double(), 0)
        assert p.argsort(descending=True).tolist() == effect.argsort().tolist()
        entropies.append(float(torch.special.entr(p).sum()) / math.log(len(p)))
    assert sum(entropies) / 2 == pytest.approx(0.4, abs=1e-3)


def test_what_was_not_shown_is_neither_good_nor_bad() -> None:
    problem = Quadratic((4,), 0)
    shown = {"d0": torch.tensor([1.0, -1.0, math.nan, 3.0]).double()}
    found = MeanField(problem.decisions, lambda done: 0.5, shown=shown).effects(problem.decisions[0])
    known = found[[0, 1, 3]]
    torch.testing.assert_close(found[2], known.mean())
    # It is held to be like each of the others, but with little weight: one sample in twenty.
    wanted = torch.tensor([0.0, -2.0, 2.0]).double()
    torch.testing.assert_close(known - known.mean(), wanted * 3 / (3 + ONE_SIDED))


def test_what_was_shown_gives_way_to_what_is_measured() -> None:
    """A false start costs samples, not the result."""
    problem = Quadratic((3, 3, 3), 1)
    for n, errors in enumerate(problem.errors):  # each in a dimension of its own
        errors *= torch.eye(6)[n]
    best = problem.best()
    shown = {f"d{n}": torch.tensor([float(k == best[n]) for k in range(3)]).double() for n in range(3)}
    optimizer = MeanField(problem.decisions, falling(150), shown=shown)
    assert problem.choice() != best
    problem.run(optimizer, 150)
    assert problem.choice() == best
