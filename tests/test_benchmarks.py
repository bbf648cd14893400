"""The benchmarks' own pieces: parallel layers, paired ratios, peaks, and rows that survive interruption."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dqss.functional import fake_quantize
from dqss.models.loaded import LoadedModel
from experiments.benchmarks import measure, memory, run, steps, tables
from experiments.benchmarks.measure import Job, Row
from experiments.benchmarks.networks import NETWORKS, settle
from experiments.benchmarks.parallel import ParallelLayer, logits_of, parallelize
from experiments.benchmarks.timing import Ratio, interleave
from experiments.harness import Table
from tests.support.nets import THREE, calibrated, cnn, images, small_space

CPU = torch.device("cpu")
MEBIBYTE = 2**20


def random_logits(model: nn.Module) -> None:
    with torch.no_grad():
        for logits in logits_of(model):
            logits.normal_()


def test_a_parallel_layer_is_the_plain_sum_in_value_and_gradient() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    x = images(5, 4, 7, 7)
    supernet = calibrated(nn.Sequential(layer), x, space=small_space(algorithms=THREE))
    found = supernet.layers["0"]
    assert found.weight is not None and found.activation is not None
    weights = [found.weight.stack.choose(k) for k in range(3)]
    grids = [found.activation[k].grid() for k in range(3)]
    model = parallelize(supernet)
    random_logits(model)
    (logits,) = logits_of(model)
    direction = torch.randn_like(layer(x))

    share = logits.detach().clone().requires_grad_()
    expected = torch.zeros_like(direction)
    for k, grid in enumerate(grids):
        quantized = fake_quantize(x, *grid.shaped(x.shape), grid.spec)
        one = torch.conv2d(quantized, weights[k], layer.bias, stride=2, padding=1, groups=2)
        expected = expected + torch.softmax(share, 0)[k] * one
    (expected * direction).sum().backward()  # type: ignore[no-untyped-call]

    y = model(x)
    (y * direction).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logits.grad, share.grad)


@pytest.mark.parametrize("option", range(3))
def test_with_one_candidate_left_parallel_layers_are_the_uniform_network(option: int) -> None:
    x = images(4)
    supernet = calibrated(cnn(), x, space=small_space(algorithms=THREE))
    with torch.no_grad(), supernet.assign(dict.fromkeys(supernet.decisions, option)):
        expected = supernet(x)
    model = parallelize(supernet)
    with torch.no_grad():
        for logits in logits_of(model):
            logits[option] = 1e4
    torch.testing.assert_close(model(x), expected)


def test_parallel_layers_need_as_many_weights_as_inputs() -> None:
    with pytest.raises(ValueError, match="3 weights for 2"):
        ParallelLayer(nn.Linear(2, 2), torch.zeros(3, 2, 2), nn.ModuleList([nn.Identity(), nn.Identity()]))


@pytest.mark.parametrize("name", steps.STEPS)
def test_every_step_moves_what_learns_and_nothing_else(name: str) -> None:
    model, x = cnn(), images(steps.IMAGES)
    step = steps.make(name, model, x[: steps.BATCH], lambda: steps.calibrated(model, x, small_space(), CPU))
    learns = [p for group in step.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in learns]
    weight = model[0].weight.detach().clone()
    for _ in range(3):
        step()
    assert not all(map(torch.equal, before, learns))
    assert torch.equal(model[0].weight, weight) == (name != steps.FLOAT)


def test_the_search_counts_its_steps() -> None:
    step = steps.SearchStep(
        steps.calibrated(cnn(), images(steps.IMAGES), small_space(), CPU), *steps.SEARCHES["search"]
    )
    for _ in range(4):
        step()
    assert [row["step"] for row in step.module.history] == [0, 1, 2, 3]


def test_settled_batch_norms_have_the_statistics_of_the_batches() -> None:
    norm, batches = nn.BatchNorm2d(3), [3 * images(8) + 1 for _ in range(4)]
    settle(nn.Sequential(norm), batches)
    together = torch.cat(batches)
    torch.testing.assert_close(norm.running_mean, together.mean((0, 2, 3)))
    assert not norm.training and norm.momentum == 0.1


def test_a_slow_round_does_not_change_a_ratio() -> None:
    assert Ratio.of([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, pytest.approx(2.1))


def test_works_take_turns_and_rounds_begin_with_another_one() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = interleave(works, 3, CPU)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys("abc", 3)


PEAK = """
import torch
from experiments.benchmarks.memory import peak_of
own, kept = torch.ones(8 << 18), torch.ones(16 << 18)
peak = peak_of(lambda: float(torch.ones(64 << 18).sum()), lambda: None, [own], torch.device("cpu"))
print(peak.passing / 2**20, peak.kept / 2**20)
"""


def test_a_peak_has_what_passes_and_what_is_kept_but_not_what_was_there() -> None:
    environment = {**os.environ, **memory.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    root = Path(run.__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", PEAK], check=True, env=environment, cwd=root, capture_output=True, text=True
    )
    passing, kept = map(float, ended.stdout.split())
    assert passing == pytest.approx(64, abs=1)
    assert kept == 16


def test_storages_count_once() -> None:
    tensor = torch.zeros(100)
    assert memory.bytes_of([tensor, tensor[:50], tensor.view(10, 10), torch.zeros(5)]) == 420


def row(name: str, ratio: float, value: float = 1.0) -> Row:
    return Row(name, ratio, ratio, ratio, value, 3)


def test_rows_that_are_there_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def alone(job: Job) -> list[Row]:
        asked.append((job.part, job.rows))
        over_a_set = [row("float pass", 1.0), row(job.part, 2.0)]
        return over_a_set if job.part in run.OVER_A_SET else [row(name, 1.5, 3.0) for name in job.rows]

    monkeypatch.setattr(run, "alone", alone)
    path = tmp_path / "rows.csv"
    jobs = [Job(part, "resnet20", 2, ("search", "parallel")) for part in ("step", "memory", "calibration")]
    run.fill(Table(path, run.COLUMNS, len(run.KEYS)), jobs)
    assert asked == [
        ("step", ("search", "parallel")),
        ("memory", ("float",)),
        ("memory", ("search",)),
        ("memory", ("parallel",)),
        ("calibration", ("calibration",)),
    ]
    asked.clear()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "step,,,parallel" not in line))
    run.fill(Table(path, run.COLUMNS, len(run.KEYS)), jobs)
    assert asked == [("step", ("parallel",))]


def test_a_peak_is_given_relative_to_the_float_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"float": 4.0, "search": 6.0}
    monkeypatch.setattr(run, "alone", lambda job: [row(job.rows[0], float("nan"), peaks[job.rows[0]])])
    found = list(run.memory_rows(Job("memory", "resnet20", 2, ("search",))))
    assert [(r.name, r.ratio) for r in found] == [("float", 1.0), ("search", 1.5)]


def test_the_summary_has_the_targets_and_all_rows(tmp_path: Path) -> None:
    table = Table(tmp_path / "rows.csv", run.COLUMNS, len(run.KEYS))
    for candidates, ratio in ((2, 1.0), (8, 1.25), (16, 1.4)):
        job = Job("step", "mobilenetv2", candidates)
        table.add(*run.key_of(job, "search"), ratio, 0.0, 9.0, 0.5, 9, "")
    lost = run.key_of(Job("step", "mobilenetv2", 16), "parallel")
    table.add(*lost, *[float("nan")] * 4, 0, "out of memory")
    text = "\n".join(tables.summary(table.path))
    assert "| search step / float step, 8 candidates | - (<= 0.95) | 1.25 (<= 1.5) |" in text
    assert "| search step, 16 candidates / 2 | - (<= 1.5) | 1.4 (<= 2.5) |" in text
    assert "| step, 16, parallel | - | out of memory |" in text


def test_what_does_not_fit_is_a_row_and_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    network = dataclasses.replace(NETWORKS["resnet20"], load=lambda: LoadedModel(cnn(), "own", "cnn"), size=6)
    monkeypatch.setitem(NETWORKS, "resnet20", network)
    monkeypatch.setattr(measure, "interleave", lambda works, rounds, home, **_: interleave(works, 1, home))

    def make(name: str, *rest: Any) -> steps.Step:
        if name == steps.PARALLEL:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(name, *rest)

    original = steps.make
    monkeypatch.setattr(steps, "make", make)
    rows = measure.step_rows(Job("step", "resnet20", 2, ("eager", "parallel")))
    assert [(r.name, r.note) for r in rows] == [("float", ""), ("eager", ""), ("parallel", "out of memory")]
    with pytest.raises(RuntimeError, match="shapes"):
        measure._lost("parallel", RuntimeError("shapes do not match"))


@pytest.mark.slow
def test_one_command_measures_everything(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.run",
        "--models",
        "resnet20",
        "--candidates",
        "2",
    ]
    command += ["--rounds", "1", "--images", "32", "--steps", "2", "--out", str(out)]
    root = Path(run.__file__).resolve().parents[2]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["part"] for r in rows} == {"step", "memory", "calibration", "search"}
    assert {r["row"] for r in rows if r["part"] == "memory"} == set(steps.STEPS)
    assert all(float(r["ratio"]) > 0 for r in rows)


def test_a_job_goes_through_json() -> None:
    job = Job("step", "resnet20", 2, ("search",))
    again = json.loads(json.dumps(asdict(job)))
    assert Job(**{**again, "rows": tuple(again["rows"])}) == job
