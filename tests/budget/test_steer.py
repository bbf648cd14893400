"""Prices and multipliers: the expected cost comes to the limit, and the optimum of the Lagrangian is met."""

import pytest
import torch

from dqss.budget.cost import SumCost
from dqss.budget.limits import Limits
from dqss.budget.solve import Limit
from dqss.budget.steer import LIKELY, MEASURED, Steering
from dqss.decision import Decision, set_outcomes
from dqss.lit.mean_field import begin_informed
from dqss.sensitivity import Estimates


def problem(count: int = 12, options: int = 5) -> tuple[list[Decision], Limits, torch.Tensor]:
    """Errors fall by four a bit; the limit is what three bits each cost."""
    torch.manual_seed(0)
    decisions = [Decision(f"d{k}", range(options)) for k in range(count)]
    sizes = torch.randint(1, 100, (count, 1)).double()
    bits = torch.arange(2, 2 + options).double()
    effects = torch.rand(count, 1).double() * 4**-bits
    cost = SumCost("size", "", {d.name: s * bits for d, s in zip(decisions, sizes, strict=True)})
    limit = Limit(cost, cost.of({d.name: 1 for d in decisions}))
    return decisions, Limits({d.name: options for d in decisions}, [limit]), effects


def settle(steering: Steering, effects: torch.Tensor, temperature: float, steps: int = 400) -> torch.Tensor:
    """What a mean-field search does at a fixed temperature with effects that it knows."""
    for _ in range(steps):
        rows = steering.priced([steering.decisions], [effects])[0]
        set_outcomes(steering.decisions, -rows / temperature)
        steering.adapt()
    return torch.softmax(torch.stack([d.logits for d in steering.decisions]).detach().double(), 1)


def test_the_expected_cost_comes_to_the_limit() -> None:
    decisions, limits, effects = problem()
    steering = Steering(decisions, limits)
    settle(steering, effects, temperature=1e-3)
    assert limits.excess(steering._probabilities())[0].item() == pytest.approx(0, abs=1e-3)
    assert steering.kind == MEASURED


def test_what_it_comes_to_is_the_best_distribution_within_the_limit() -> None:
    """``E[effect] - T entropy`` subject to the expected cost, against scipy's own constrained optimum."""
    from scipy.optimize import minimize

    decisions, limits, effects = problem(count=4, options=3)
    temperature = 2e-3
    steering = Steering(decisions, limits)
    p = settle(steering, effects, temperature)
    price = torch.stack([limits.limits[0].cost.single[d.name] for d in decisions])  # type: ignore[attr-defined]
    most = limits.limits[0].most

    def free_energy(x: object) -> float:
        q = torch.softmax(torch.as_tensor(x).reshape(4, 3), 1)
        return float((q * effects).sum() - temperature * torch.special.entr(q).sum()) * 1e3

    def room(x: object) -> float:
        return float(1 - (torch.softmax(torch.as_tensor(x).reshape(4, 3), 1) * price).sum() / most)

    wanted = minimize(
        free_energy, torch.zeros(12).double().numpy(), constraints={"type": "ineq", "fun": room}, tol=1e-10
    )
    q = torch.softmax(torch.as_tensor(wanted.x).reshape(4, 3), 1)
    torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


def test_a_limit_that_does_not_bind_costs_nothing() -> None:
    decisions, limits, effects = problem()
    free = Limits(limits.options, [Limit(limits.limits[0].cost, 1e9)])
    steering = Steering(decisions, free)
    p = settle(steering, effects, temperature=1e-3)
    torch.testing.assert_close(p, torch.softmax(-effects / 1e-3, 1), atol=1e-3, rtol=0)
    assert steering.choose() == {d.name: int(v.argmin()) for d, v in zip(decisions, effects, strict=True)}


def test_options_that_are_alike_have_their_mean_price_and_the_cheapest_is_taken() -> None:
    decision = Decision("d", range(3))
    decision.recognize(["same", "same", "other"])
    cost = SumCost("size", "", {"d": torch.tensor([4.0, 2.0, 1.0]).double()})
    steering = Steering([decision], Limits({"d": 3}, [Limit(cost, 2.0)]))
    effects = torch.tensor([[-1.0, 1.0]]).double()
    priced = steering.priced([[decision]], [effects])[0]
    assert (priced - effects)[0].tolist() == pytest.approx([2 * 0.1 * 3 / 2, 2 * 0.1 * 1 / 2])
    assert steering.scores()["d"].tolist() == [-1, -1, 1]
    assert steering.choose() == {"d": 1}


def test_adam_is_pushed_below_a_limit_by_the_penalty() -> None:
    decisions, limits, effects = problem()
    steering = Steering(decisions, limits)
    adam = torch.optim.Adam([d.logits for d in decisions], lr=0.1)
    for _ in range(600):
        adam.zero_grad()
        p = torch.stack([torch.softmax(d.logits.double(), 0) for d in decisions])
        loss = 0.1 + (p * effects).sum()
        (loss + steering.penalty(loss)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    assert abs(limits.excess(steering._probabilities())[0].item()) < 0.02
    assert steering.kind == LIKELY
    assert limits.hold(steering.choose())


def test_a_frozen_decision_stays_where_it_is() -> None:
    from dqss.decision import Frozen

    decisions, limits, _ = problem()
    decisions[0].relaxation = Frozen(2)
    steering = Steering(decisions, limits)
    steering.penalty(torch.tensor(1.0)).backward()  # type: ignore[no-untyped-call]
    assert decisions[0].logits.grad is None and decisions[1].logits.grad is not None


def test_estimates_are_begun_from_and_choose_before_anything_is_measured() -> None:
    decisions, limits, effects = problem()
    known = {d.name: v for d, v in zip(decisions, effects, strict=True)}
    alone = ({name: -row for name, row in known.items()}, {name: torch.zeros(5) for name in known})
    estimates = Estimates(known, {name: torch.zeros(5, 5).double() for name in known}, alone)
    steering = Steering(decisions, limits, estimates)
    begin_informed(steering, 0.3)
    p = steering._probabilities()
    assert limits.excess(p)[0].item() == pytest.approx(0, abs=0.02)
    entropy = sum(float(torch.special.entr(row.detach()).sum()) for row in p.values()) / len(p)
    assert entropy == pytest.approx(0.3 * torch.tensor(5.0).log().item(), rel=0.02)
    wanted = [limits.solve(each) for each in (alone[1], alone[0], known)]
    assert steering.begin() == wanted
    assert all(limits.hold(begun) for begun in steering.begin())
    assert Steering(decisions, limits).begin() == []


def test_the_state_comes_back() -> None:
    decisions, limits, effects = problem()
    known = {d.name: v for d, v in zip(decisions, effects, strict=True)}
    alone = ({name: -row for name, row in known.items()}, {name: torch.zeros(5) for name in known})
    estimates = Estimates(known, {name: torch.zeros(5, 5).double() for name in known}, alone)
    steering, other = Steering(decisions, limits, estimates), Steering(decisions, limits)
    settle(steering, effects, 1e-3, steps=3)
    other.load_state_dict(steering.state_dict())
    assert other.begin() == steering.begin() != []
    assert other.choose() == steering.choose() and torch.equal(other.multipliers, steering.multipliers)
