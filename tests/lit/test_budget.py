"""A search within a budget, whole: every assignment keeps it, and a killed one ends in the same strategy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dqss
from dqss.budget import Budget
from dqss.discretize import RefineSettings
from dqss.errors import BudgetError, OutputError
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, Schedule, SoftmaxSchedule
from dqss.lit.settings import PTQSettings
from dqss.strategy import Strategy
from tests.support.nets import cnn, images, small_space

MIXED = small_space([2, 3, 4, 6, 8])
BITOPS = 16.0 * (6 * 36 * 27 + 6 * 4 * 9 + 24 * 4)
"""Of four bits everywhere."""


def settings(schedule: Schedule | None = None, **given: Any) -> PTQSettings:
    defaults: dict[str, Any] = {"steps": 16, "discrete_every": 4, "discrete_images": 4, "finalists": 2}
    defaults |= {"refine": RefineSettings(passes=4, screen=8, confidence=0.5), "screen_images": 8}
    return PTQSettings(schedule=schedule or MeanFieldSchedule(reheats=0), **{**defaults, **given})


@pytest.fixture
def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return cnn(), images(40)


@pytest.mark.parametrize("schedule", [MeanFieldSchedule(reheats=0), SoftmaxSchedule(), GumbelSchedule()])
@pytest.mark.parametrize(
    "given",
    [
        {"average_weight_bits": 3.5},
        {"bitops": BITOPS, "size_mb": 0.0005},
        {"average_weight_bits": 4.0, "average_activation_bits": 4.0},
    ],
)
def test_everything_that_is_kept_is_within_the_budget(
    net: tuple[nn.Module, torch.Tensor], schedule: Schedule, given: dict[str, float]
) -> None:
    result = dqss.search_ptq(*net, MIXED, settings(schedule), budget=Budget(**given))
    record = result.bundle.strategy.budget
    assert record is not None and record["limits"] == given
    achieved: Any = record["achieved"]
    assert all(achieved[name] <= most for name, most in given.items())
    measured = isinstance(schedule, MeanFieldSchedule)
    assert record["scores"] == ("measured effects" if measured else "minus log probability")
    # And counted from the strategy alone.
    strategy, model = result.bundle.strategy, net[0]
    shapes = {"0": model[0].weight, "3": model[3].weight, "6": model[6].weight}  # type: ignore[index]
    values = {name: weight.numel() for name, weight in shapes.items()}
    bits = {(name, role): choice.bits for name, role, choice in strategy.choices()}
    mean = sum(n * bits[name, "weight"] for name, n in values.items()) / sum(values.values())
    assert achieved["average_weight_bits"] == pytest.approx(mean)
    macs = {"0": 6 * 36 * 27, "3": 6 * 4 * 9, "6": 24 * 4}
    work = sum(n * bits[name, "weight"] * bits[name, "activation"] for name, n in macs.items())
    assert achieved["bitops"] == work


def test_the_smallest_budget_there_is_leaves_one_width(net: tuple[nn.Module, torch.Tensor]) -> None:
    result = dqss.search_ptq(*net, MIXED, settings(), budget=Budget(average_weight_bits=2.0))
    chosen = {
        role: {c.bits for _, r, c in result.bundle.strategy.choices() if r == role}
        for role in ("weight", "activation")
    }
    assert chosen["weight"] == {2} and result.metrics["best_uniform"] is not None


def test_uniform_strategies_that_the_budget_would_allow_more_bits_are_left_out(
    net: tuple[nn.Module, torch.Tensor],
) -> None:
    result = dqss.search_ptq(*net, MIXED, settings(), budget=Budget(average_weight_bits=4.9))
    names = [name for name in result.discretized.assignments if name.startswith("W")]
    assert names and all("@4 " in name.split(" / ")[0] and "@8 " in name.split(" / ")[1] for name in names)


def test_an_infeasible_budget_is_refused_before_the_search(net: tuple[nn.Module, torch.Tensor]) -> None:
    with pytest.raises(BudgetError, match="no less than 2 bits"):
        dqss.search_ptq(*net, MIXED, settings(), budget=Budget(average_weight_bits=1.5))


def test_a_budget_that_binds_nothing_finds_what_is_found_without(net: tuple[nn.Module, torch.Tensor]) -> None:
    """The logits' own choice, and what is refined from it and other beginnings is no worse."""
    free = dqss.search_ptq(*net, MIXED, settings(SoftmaxSchedule(), steps=4))
    wide = dqss.search_ptq(*net, MIXED, settings(SoftmaxSchedule(), steps=4), budget=Budget(size_mb=1e6))
    assert wide.supernet.argmax() == free.supernet.argmax()


def test_where_nothing_is_learned_the_estimates_decide(net: tuple[nn.Module, torch.Tensor]) -> None:
    """One step: what is begun from mixes widths, and is better than all uniform strategies in the budget."""
    model, _ = net
    with torch.no_grad():
        model[6].weight *= 4  # type: ignore[index, operator]
    given = settings(steps=1, refine=RefineSettings(passes=0))
    result = dqss.search_ptq(model, images(200), MIXED, given, budget=Budget(average_weight_bits=5.5))
    outcome, options = result.discretized, result.supernet.decisions
    found = outcome.assignments["argmax"]
    bits = {options[name].options[k].spec.bits for name, k in found.items() if name.endswith("weight")}  # type: ignore[attr-defined]
    assert len(bits) > 1
    assert outcome.best_uniform is not None
    assert outcome.selection["argmax"] < outcome.selection[outcome.best_uniform]


class Killed(Exception):
    pass


def test_a_search_that_was_killed_ends_in_the_same_strategy(
    net: tuple[nn.Module, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(average_weight_bits=3.5, bitops=BITOPS)
    whole = dqss.search_ptq(*net, MIXED, settings(checkpoint_every=3), budget=budget)
    from dqss.lit import mean_field

    step, count = mean_field.MeanField.step, 0

    def killing(self: Any, closure: Any = None) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise Killed
        return step(self, closure)

    monkeypatch.setattr(mean_field.MeanField, "step", killing)
    with pytest.raises(Killed):
        dqss.search_ptq(*net, MIXED, settings(checkpoint_every=3), budget=budget, run_dir=tmp_path)
    with pytest.raises(OutputError, match="settings"):
        dqss.search_ptq(*net, MIXED, settings(checkpoint_every=3), run_dir=tmp_path)
    dqss.search_ptq(*net, MIXED, settings(checkpoint_every=3), budget=budget, run_dir=tmp_path)
    again = Strategy.load(tmp_path)
    assert again.layers == whole.bundle.strategy.layers and again.budget == whole.bundle.strategy.budget
