"""What a search prints: the plan of a dry run, the table of choices and three lines at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dqss.calls import call_model
from dqss.choice import TensorChoice
from dqss.coverage import Coverage
from dqss.lit.build import build, limits_of
from dqss.lit.fit import planned_steps, settled
from dqss.lit.objective import Objective
from dqss.lit.qat_build import CALIBRATION_BATCH, build_qat
from dqss.lit.qat_search import QATResult
from dqss.lit.qat_settings import QATSettings
from dqss.lit.search import SearchResult
from dqss.lit.settings import BATCH_SIZE, PTQSettings
from dqss.lit.training_data import TrainingData
from dqss.measure import PROBES
from dqss.metrics import as_read
from dqss.mixed import MixedQuantizer, MixedWeight
from dqss.progress import Reporter
from dqss.recompute import recomputing
from dqss.report import REPORT_FILE
from dqss.samples import Samples
from dqss.space import SearchSpace
from dqss.supernet import Supernet
from dqss.uniform import uniform_assignments

WIDTH = 80


def print_result(console: Console, result: SearchResult | QATResult, folder: Path | None) -> None:
    """Layers and choices, then float, best uniform (or argmax) and searched, in 80 columns."""
    console = _narrow(console)
    table = Table("layer", "weight", "p", "activation", "p", box=None, pad_edge=False)
    schemes: dict[str, set[str]] = {"weight": set(), "activation": set()}
    for _, role, choice in result.bundle.strategy.choices():
        schemes["weight" if role == "weight" else "activation"].add(choice.candidate().spec.scheme)
    several = {role: len(found) > 1 for role, found in schemes.items()}
    for name, layer in result.bundle.strategy.layers.items():
        weight = _cells(layer.weight, several["weight"])
        table.add_row(_plain(name), *weight, *_cells(layer.activation, several["activation"]))
    for name, role, choice in result.bundle.strategy.choices():
        if role not in ("weight", "activation"):
            table.add_row(_plain(name), role, "", *_cells(choice, several["activation"]))
    console.print(table)
    _print_coverage(console, result.supernet.coverage)
    print_budget(console, result.bundle.strategy.budget)
    rows = result.metrics
    best = rows["best_uniform"]
    if best is not None:
        console.print(f"\nbest uniform: {_plain(best['name'])}")
    console.print()
    part = "selection" if rows["float"]["validation"] is None else "validation"
    middle = "argmax" if isinstance(result, QATResult) else "best_uniform"
    before = ("unrepaired",) if rows.get("unrepaired") else ()
    print_rows(console, rows, ("float", middle, *before, "searched"), part)
    if folder is not None:
        console.print(
            f"strategy in {folder}, with a page to look at: {REPORT_FILE}", soft_wrap=True, markup=False
        )


def print_budget(console: Console, budget: Mapping[str, Any] | None) -> None:
    """A line for each limit, with what the exported strategy costs."""
    if budget is None:
        return
    console.print()
    for name, most in budget["limits"].items():
        _narrow(console).print(f"budget {name}: {budget['achieved'][name]:.6g} of {most:.6g}")


def print_rows(console: Console, rows: Mapping[str, Any], names: Iterable[str], part: str) -> None:
    """A line for each of the named rows of ``metrics.json``."""
    for name in names:
        if rows[name] is None:
            continue
        measured = rows[name][part]
        cells = [as_read(key, value) for key, value in measured.items() if key not in ("distance", "count")]
        cells.append(f"{rows['distance']} {measured['distance']:.4f}")
        title = name.replace("_", " ")
        _narrow(console).print(f"{title:<13}{'  '.join(cells)}  on {measured['count']} ({part})")


def print_plan(
    console: Console, model: nn.Module, samples: Samples, space: SearchSpace, settings: PTQSettings, seed: int
) -> None:
    """Layers, candidates, estimated time and memory, from one timed step; nothing is written."""
    console = _narrow(console)
    few = samples.subset(range(min(len(samples), max(3, 2 * (settings.batch_size or BATCH_SIZE)))))
    device = torch.device("cpu")
    started = time.perf_counter()
    _, evaluator = build(model, few, space, settings, seed, None, device, Reporter())
    setup = time.perf_counter() - started
    supernet = evaluator.supernet
    limits_of(settings.budget, evaluator)  # refuses what no choice keeps
    _print_candidates(console, supernet)
    if supernet.preparation:
        each = sum(moments.products for moments in supernet.preparation) / len(evaluator.parts["search"])
        console.print(
            f"\nadaround: {len(supernet.preparation)} weights are fitted to inputs before the search, "
            f"{each / 1e6:.0f} million multiply-accumulates an input"
        )
    indices = evaluator.parts["search"][: evaluator.batch_size]
    with recomputing(supernet, settings.recompute or ()):
        evaluator.first_order(supernet.argmax(), "search", 1)  # compiles; that is paid once
        started = time.perf_counter()
        evaluator.first_order(supernet.argmax(), "search", len(indices))
    per_image = (time.perf_counter() - started) / len(indices) / 3
    uniform = len(uniform_assignments(supernet))
    settings = settled(settings, supernet)
    evaluations = _expected_evaluations(len(samples), uniform, planned_steps(settings, supernet), settings)
    evaluations += 3 * PROBES if supernet.needs_gradients else 0
    minutes = (setup + evaluations * per_image) / 60
    memory = samples.bytes + sum(p.numel() * p.element_size() for p in model.parameters())
    codes = sum(q.bytes for q in supernet.quantizers() if isinstance(q, MixedWeight))
    console.print(f"\n{_counts(supernet)}, {uniform} uniform strategies")
    console.print(f"about {evaluations} evaluations, {minutes:.1f} minutes on this machine")
    if settings.repair is not None and settings.repair.iterations:
        console.print(f"repair comes on top: {settings.repair.iterations} iterations a block or layer")
    console.print(f"about {(memory + codes) / 2**20:.0f} MiB for inputs, weights and their candidates")


def print_qat_plan(
    console: Console,
    model: nn.Module,
    samples: Samples,
    train: TrainingData,
    space: SearchSpace,
    settings: QATSettings,
    seed: int,
) -> None:
    """Layers, candidates and estimated time of a QAT search, from timed steps; nothing is written."""
    console = _narrow(console)
    few = samples.subset(range(min(len(samples), CALIBRATION_BATCH)))
    device = torch.device("cpu")
    work = build_qat(model, few, train, space, settings, seed, None, device, Reporter())
    _print_candidates(console, work.supernet)
    plan = settings.update.plans(len(train), settings.batch_size, seed)[0]
    inputs, targets = train.batch(plan.at(0))
    objective = Objective(work.teacher, work.distance, settings.loss, settings.distillation)
    work.supernet.train()
    for _ in range(2):  # the first one compiles; that is paid once
        started = time.perf_counter()
        with work.supernet.mode("relaxed"):
            loss = objective(call_model(work.supernet, inputs), inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
    per_step = time.perf_counter() - started
    epochs = settings.epochs + settings.tune_epochs
    steps = round(epochs * (len(train) // plan.size))
    console.print(f"\n{_counts(work.supernet)}")
    console.print(f"about {steps} steps, at most {steps * per_step / 60:.1f} minutes on this machine")


def _print_candidates(console: Console, supernet: Supernet) -> None:
    table = Table("layer", "weight", "activation", box=None, pad_edge=False)
    for name, layer in supernet.layers.items():
        table.add_row(_plain(name), _options(layer.weight), _options(layer.activation))
    for several in (supernet.products, supernet.points):
        for name, each in several.items():
            for operand, quantizer in each.operands():
                table.add_row(_plain(name), operand, _options(quantizer))
    console.print(table)
    _print_coverage(console, supernet.coverage)


def _counts(supernet: Supernet) -> str:
    options = sum(len(decision.options) for decision in supernet.decisions.values())
    products = f"{len(supernet.products)} products, " if supernet.products else ""
    points = f"{len(supernet.points)} points, " if supernet.points else ""
    decisions = len(supernet.decisions)
    return f"{len(supernet.layers)} layers, {products}{points}{decisions} decisions, {options} candidates"


def _expected_evaluations(count: int, uniform: int, steps: int, settings: PTQSettings) -> int:
    search, select = (round(share * count) for share in settings.parts)
    assert settings.batch_size is not None  # settled
    batch = min(settings.batch_size, max(search, 1))
    screening = uniform * (settings.screen_images or 0) * 2 + settings.finalists * search
    found = len(settings.schedule.cold(steps))
    return int(
        search
        + 3 * steps * batch
        + (found * search if found > 1 else 0)
        + settings.refine.limit(search)
        + screening
        + (settings.finalists + 4) * select
    )


def _options(quantizer: MixedQuantizer | None) -> str:
    if quantizer is None:
        return "float"
    first = quantizer[0].candidate.label
    return f"{len(quantizer.candidates)} candidates ({first}, ...)"


def _cells(choice: TensorChoice | None, scheme: bool) -> tuple[str, str]:
    if choice is None:
        return "float", ""
    probability = "" if choice.probability is None else f"{choice.probability:.2f}"
    candidate = choice.candidate()
    return candidate.title if scheme else candidate.label, probability


def _print_coverage(console: Console, coverage: Coverage) -> None:
    for words, names in (
        ("in float, as the search space says", coverage.skipped),
        ("weight only (read, never called)", coverage.weight_only),
        ("in float (never used by the inputs)", coverage.unused),
        ("rounded to the nearest code only (adaround is not for such layers)", coverage.plain),
        *(("one weight, one decision", group) for group in coverage.tied),
        ("products of two activations in float (cannot be searched)", coverage.hidden_products),
        ("sums, concatenations and averages in float (cannot be quantized)", coverage.hidden_points),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            console.print(_plain(f"{words}: {shown}"), soft_wrap=True)
    for group in coverage.ties:
        console.print(_plain(f"one decision: {', '.join(group)}"), soft_wrap=True)
    count = len(coverage.products)
    if count:
        console.print(
            f"{count} product{'s' * (count > 1)} of two activations (attention) stay in float: 'W8A8' means "
            "weights and layer inputs; search_space.products=true searches them"
        )


def _narrow(console: Console) -> Console:
    return Console(width=min(console.width, WIDTH), file=console.file, highlight=False)


def _plain(text: str) -> str:
    # Names come from strangers' models: never rich markup.
    return text.replace("[", r"\[")
