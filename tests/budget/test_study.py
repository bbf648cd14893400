"""The study of budgets: its baselines against direct counts, and all of its rows on a tiny network."""

import csv
from pathlib import Path

import pytest
import torch

from dqss.budget import Budget
from dqss.discretize import RefineSettings
from dqss.lit.settings import PTQSettings
from dqss.samples import Samples
from experiments.budgets import baselines
from experiments.budgets.run import COLUMNS, KEYS, ROWS, Study, run
from experiments.harness import HeldOut, Table
from tests.support.nets import calibrated, cnn, evaluator_of, images, small_space


def test_the_curvature_is_the_mean_diagonal_of_the_hessian_of_the_divergence() -> None:
    """On a linear network, whose Hessian can be computed whole."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(3, 4)), images(400, 3)
    supernet = calibrated(model, inputs, space=small_space(4))
    evaluator = evaluator_of(supernet, inputs, {"refine": list(range(400)), "select": [0]})
    curvatures = baselines.curvatures(evaluator, images=400)

    def divergence(weight: torch.Tensor) -> torch.Tensor:
        wanted = torch.log_softmax(model(inputs), 1).detach()
        logits = torch.nn.functional.linear(inputs, weight.reshape(4, 3), model[0].bias)
        return (wanted.exp() * (wanted - torch.log_softmax(logits, 1))).sum(1).mean()

    hessian = torch.func.hessian(divergence)(model[0].weight.detach().reshape(-1))
    assert curvatures["0.weight"] == pytest.approx(hessian.trace().item() / 12, rel=0.1)  # labels are drawn

    def of_input(x: torch.Tensor) -> torch.Tensor:
        wanted = torch.log_softmax(model(x), 0).detach()
        return (wanted.exp() * (wanted - torch.log_softmax(model(x), 0))).sum()

    mean = torch.stack([torch.func.hessian(of_input)(x).trace() for x in inputs]).mean() / 3
    assert curvatures["0.activation"] == pytest.approx(mean.item(), rel=0.1)
    assert not any(parameter.requires_grad for parameter in supernet.network_parameters())


def test_scores_fall_with_bits_and_rise_with_nothing_else() -> None:
    torch.manual_seed(0)
    inputs = images(16)
    supernet = calibrated(cnn(), inputs, space=small_space([2, 4, 8], algorithms=["minmax"]))
    evaluator = evaluator_of(supernet, inputs, {"refine": list(range(16)), "select": [0]})
    for scores in (baselines.sqnr(evaluator), baselines.hessian(evaluator)):
        assert set(scores) == set(supernet.decisions)
        for score in scores.values():
            two, four, eight = score.tolist()
            assert two > four > eight > 0


def test_greedy_lowers_until_it_fits_and_no_further() -> None:
    torch.manual_seed(0)
    inputs = images(16)
    supernet = calibrated(cnn(), inputs, space=small_space([2, 4, 8], algorithms=["minmax"]))
    evaluator = evaluator_of(supernet, inputs, {"refine": list(range(16)), "select": [0]})
    from dqss.budget.workload import watch

    limits = Budget(average_weight_bits=5).on(supernet, watch(supernet, inputs[:1]))
    start = {name: 2 for name in supernet.decisions}
    scores = baselines.measured(evaluator, start, "refine", 16)
    found = baselines.greedy(evaluator, start, limits, scores)
    assert limits.hold(found)
    lowered = [name for name in found if found[name] != start[name]]
    assert lowered and all(name.endswith("weight") for name in lowered)
    # Some last step was needed: to take one of the steps back would be too much.
    assert any(not limits.hold({**found, name: found[name] + 1}) for name in lowered)


@pytest.mark.parametrize("target", ["w4a8", "bitops_w4a4"])
def test_every_row_of_the_study_is_within_its_budget(tmp_path: Path, target: str) -> None:
    torch.manual_seed(2)
    model, labels = cnn(), torch.randint(0, 4, (40,))
    held_out, dev = HeldOut(model, images(40), labels, 20), HeldOut(model, images(20), labels[:20], 20)
    settings = PTQSettings(
        steps=6, discrete_every=0, finalists=1, refine=RefineSettings(passes=1), screen_images=8
    )
    inputs = images(24)
    study = Study("cnn", model, held_out, dev, lambda seed: Samples.of(inputs), (3, 4, 8), settings)
    for _ in range(2):  # the second time nothing is left to do
        run(study, [target], [0], list(ROWS), Table(tmp_path / "results.csv", COLUMNS, KEYS))
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert list(rows) and set(rows) == set(ROWS)
    most = {"w4a8": 4.0, "bitops_w4a4": 16.0 * (6 * 36 * 27 + 6 * 4 * 9 + 24 * 4)}[target]
    for name, row in rows.items():
        if name != "float":
            assert 0 < float(row["cost"]) <= most
    assert float(rows["best_uniform"]["cost"]) == float(rows["algorithm_only"]["cost"]) == most
