"""The sentence at the top says what the numbers say."""

from typing import Any

import pytest

from dqss.report.record import Gain
from dqss.report.verdict import verdict


def metrics(
    searched: float | None, uniform: float | None, exported: str = "refined", part: str = "validation"
) -> Any:
    def row(name: str, distance: float | None, top1: float) -> Any:
        measured = {"distance": distance, "count": 50, "top1": top1}
        return {"name": name, "selection": measured, "validation": measured if part == "validation" else None}

    return {
        "float": row("float", 0.0, 0.9),
        "best_uniform": None if uniform is None else row("W mse@4", uniform, 0.6),
        "searched": row(exported, searched, 0.7),
        "distance": "kl",
    }


def test_better_by_so_much() -> None:
    told = verdict(metrics(0.3, 0.4), Gain(mean=0.1, error=0.01, count=20))
    assert "closer to the float network" in told
    assert "top1 70.00 %, kl 0.3000 instead of top1 60.00 %, kl 0.4000 (25% less) on 50 validation" in told
    assert "gain on the 20 inputs kept for the selection: 0.1 ± 0.01, far beyond chance" in told


@pytest.mark.parametrize(
    ("error", "judged"), [(0.0333, "far beyond"), (0.05, "probably beyond"), (0.051, "within")]
)
def test_how_sure(error: float, judged: str) -> None:
    assert f"{judged} chance)" in verdict(metrics(0.3, 0.4), Gain(mean=0.1, error=error, count=20))


def test_few_inputs_say_nothing() -> None:
    assert "on 9 inputs kept for the selection: too few" in verdict(
        metrics(0.3, 0.4), Gain(mean=0.1, error=0.001, count=9)
    )


def test_a_uniform_strategy_is_called_one() -> None:
    told = verdict(metrics(0.4, 0.4, exported="W mse@4"), None)
    assert told.startswith("A uniform strategy is exported") and "W mse@4" in told and "kl 0.4000" in told


def test_worse_elsewhere_is_admitted() -> None:
    told = verdict(metrics(0.5, 0.4), Gain(mean=0.02, error=0.02, count=20))
    assert told.startswith("On the validation data the best uniform strategy is the better one: top1 60.00 %")
    assert "within chance" in told


def test_what_is_not_finite_is_the_worst() -> None:
    assert "better one" in verdict(metrics(None, 0.4), None)
    nowhere = {**metrics(0.4, 0.1), "best_uniform": {**metrics(None, 0.1)["searched"], "name": "W mse@4"}}
    told = verdict(nowhere, None)
    assert "closer" in told and "kl inf" in told and "% less" not in told


def test_the_selection_speaks_where_there_is_no_validation() -> None:
    assert "on 50 selection inputs" in verdict(metrics(0.3, 0.4, part="selection"), None)


def test_nothing_to_compare_with_or_nothing_at_all() -> None:
    assert "No uniform strategy exists" in verdict(metrics(0.3, None), None)
    assert verdict({}, None) == "There are no measurements in this folder."
