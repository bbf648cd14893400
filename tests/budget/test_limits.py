"""Limits on a supernet: kept exactly, refused with the smallest value, and read from tables."""

import random
from pathlib import Path

import pytest
import torch

from dqss.budget.cost import SumCost
from dqss.budget.limits import Budget, Limits
from dqss.budget.solve import Limit
from dqss.budget.workload import watch
from dqss.errors import BudgetError
from dqss.supernet import Supernet
from tests.support.budgets import best, limits, sizes, sum_cost
from tests.support.nets import calibrated, cnn, images, small_space


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return calibrated(cnn(), images(8), space=small_space([2, 4, 8]))


def on(supernet: Supernet, **given: object) -> Limits:
    return Budget(**given).on(supernet, watch(supernet, images(1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("average_weight_bits", 2.0),
        ("average_activation_bits", 2.0),
        ("bitops", 4.0 * (6 * 36 * 27 + 6 * 4 * 9 + 24 * 4)),
        ("activation_memory_kb", 6 * 36 * 2 / 8e3),
    ],
)
def test_an_impossible_limit_is_refused_with_the_smallest_value(
    supernet: Supernet, name: str, least: float
) -> None:
    with pytest.raises(BudgetError, match=f"budget.{name}=.*no less than") as caught:
        on(supernet, **{name: least * 0.99})
    said = float(str(caught.value).split("no less than ")[1].split()[0].rstrip(";"))
    assert least <= said <= least * 1.001
    assert (
        on(supernet, **{name: said}).achieved(on(supernet, **{name: said}).solve(zeros(supernet)))[name]
        <= said
    )
    on(supernet, **{name: least})


def zeros(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(len(d.options)) for name, d in supernet.decisions.items()}


def wide(supernet: Supernet) -> dict[str, torch.Tensor]:
    """Scores that want as many bits as there are."""
    return {
        name: torch.tensor([4.0**-option.spec.bits for option in decision.options])
        for name, decision in supernet.decisions.items()
    }


def test_limits_that_exclude_each_other_are_refused_together() -> None:
    options = {"a": 2, "b": 2}
    here = SumCost("size_mb", "MB", {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([1.0, 2.0])})
    there = SumCost("bitops", "", {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 2.0])})
    both = Limits(options, [Limit(here, 3.0), Limit(there, 4.0)])
    with pytest.raises(
        BudgetError,
        match=r"cannot be kept together: raise budget\.size_mb=3 to 5 MB, or budget\.bitops=4 to 7",
    ):
        both.check()
    Limits(options, [Limit(here, 5.0), Limit(there, 4.0)]).check()
    Limits(options, [Limit(here, 3.0), Limit(there, 7.0)]).check()


def test_several_limits_hold_at_once_and_none_is_left_unused(supernet: Supernet) -> None:
    found = on(supernet, average_weight_bits=4.0, bitops=16.0 * (6 * 36 * 27 + 6 * 4 * 9 + 24 * 4))
    assignment = found.solve(wide(supernet))
    achieved = found.achieved(assignment)
    assert achieved["average_weight_bits"] <= 4.0 and found.hold(assignment)
    assert achieved["average_weight_bits"] > 3.0
    assert set(achieved) == {
        "size_mb", "exported_size_mb", "average_weight_bits", "average_activation_bits", "bitops",
        "activation_memory_kb",
    }  # fmt: skip


def test_a_limit_far_away_changes_nothing(supernet: Supernet) -> None:
    scores = {n: torch.rand(len(d.options)) for n, d in supernet.decisions.items()}
    assert on(supernet, size_mb=1.0).solve(scores) == {n: int(s.argmin()) for n, s in scores.items()}


@pytest.mark.parametrize("seed", range(30))
def test_scores_that_are_no_numbers_are_the_last_to_be_taken(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    kept = Limits(options, limits(source, options, [sum_cost(source, options, "cost")]))
    scores = {n: torch.rand(k, dtype=torch.float64) for n, k in options.items()}
    plain = {n: value - value.min() for n, value in scores.items()}
    wanted = best(SumCost("score", "", plain), options, kept.limits)
    if wanted is None:
        with pytest.raises(BudgetError):
            kept.check()
        return
    found = kept.solve(scores)
    assert sum(float(plain[n][k]) for n, k in found.items()) == pytest.approx(wanted, abs=1e-9)
    for n in options:
        spoilt = {**scores, n: torch.full_like(scores[n], float("nan"))}
        assert kept.hold(kept.solve(spoilt))


@pytest.mark.parametrize(
    "given", [{"size_mb": 0}, {"bitops": -1}, {"size_mb": float("nan")}, {"latency_ms": 1}]
)
def test_limits_without_sense_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=f"budget.{next(iter(given))}"):
        Budget(**given)  # type: ignore[arg-type]


def rows(layers: dict[str, float]) -> str:
    lines = ["layer,weight_bits,activation_bits,ms"]
    for layer, ms in layers.items():
        lines += [f"{layer},{w},{a},{ms * w * a}" for w in (2, 4, 8) for a in (2, 4, 8)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("suffix", [".csv", ".yaml"])
def test_latency_is_the_sum_of_the_rows_of_a_table(supernet: Supernet, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"table{suffix}"
    text = rows({"0": 0.5, "*": 0.25})
    if suffix == ".yaml":
        keys = text.splitlines()[0].split(",")
        lines = [dict(zip(keys, line.split(","), strict=True)) for line in text.splitlines()[1:]]
        text = "\n".join(
            "- {" + ", ".join(f"{k}: '{v}'" if k == "layer" else f"{k}: {v}" for k, v in line.items()) + "}"
            for line in lines
        )
    file.write_text(text)
    limit = on(supernet, latency_ms=16.0, latency_table=str(file))
    assignment = limit.solve(wide(supernet))
    bits = {n: supernet.decisions[n].options[k].spec.bits for n, k in assignment.items()}
    total = sum(
        ms * bits[f"{n}.weight"] * bits[f"{n}.activation"] for n, ms in (("0", 0.5), ("3", 0.25), ("6", 0.25))
    )
    assert limit.achieved(assignment)["latency_ms"] == pytest.approx(total)
    assert 12.0 < total <= 16.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected rows"),
        ("layer,ms\n0,1\n", "row 1: expected layer, weight_bits"),
        ("layer,weight_bits,activation_bits,ms\n0,two,2,1\n", "row 1: expected bits"),
        ("layer,weight_bits,activation_bits,ms\n0,2,2,-1\n", "row 1: ms=-1"),
        (rows({"[03]": 1.0}), "no row for layer '6' with weights of 2 bits and activations of 2 bits"),
    ],
)
def test_a_bad_table_is_one_line(supernet: Supernet, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "table.csv"
    file.write_text(text)
    with pytest.raises(BudgetError, match=said) as caught:
        on(supernet, latency_ms=1.0, latency_table=str(file))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_table_is_one_line(supernet: Supernet, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be read"):
        on(supernet, latency_ms=1.0, latency_table=str(tmp_path / "none.csv"))
