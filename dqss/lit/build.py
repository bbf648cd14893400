"""From a model, inputs and a search space to a calibrated supernet that can be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqss.budget.limits import Budget, Limits
from dqss.budget.workload import watch
from dqss.calls import call_model, first_tensor
from dqss.errors import DataError, NonFiniteError
from dqss.io import Journal
from dqss.layers import searchable_layers
from dqss.lit.identity import JOURNAL, search_identity
from dqss.lit.pictures import check_pictures
from dqss.lit.ranks import rank
from dqss.lit.settings import EASY_BATCH_SIZE, PTQSettings
from dqss.losses import default_distance
from dqss.measure import Evaluator, Meter, batches, home, to_device
from dqss.prepare import Prepared, prepare
from dqss.prepare.modules import canonical_name
from dqss.prepare.work import Bits
from dqss.progress import Reporter
from dqss.samples import Samples, split
from dqss.space import SearchSpace
from dqss.supernet import Supernet
from dqss.ties import tie

_OPTIONAL: dict[str, Callable[[PTQSettings], bool]] = {
    "equalize": lambda settings: settings.equalize,
    "smooth": lambda settings: settings.smooth,
}
SMOOTHED_INPUTS = 16
"""That show the ranges of channels; few enough to go forward at once."""


def build(
    model: nn.Module,
    samples: Samples,
    space: SearchSpace,
    settings: PTQSettings,
    seed: int,
    folder: Path | None,
    device: torch.device,
    reporter: Reporter,
    teacher: nn.Module | None = None,
) -> tuple[Prepared, Evaluator]:
    """Prepare the network, attach the decisions and calibrate all candidates in one pass.

    Calibration sees the part that is searched on; the selection part stays untouched. Where some
    candidate needs gradients, some of the inputs are run once more, forward and backward. Distances are
    taken to what ``teacher`` gives, on the device already, where that is another network than ``model``.
    """
    if len(samples) < 2:
        raise DataError(f"{len(samples)} calibration inputs: at least 2 are needed")
    check_pictures(model, samples)
    searched, selected = split(len(samples), settings.parts, seed)
    # Shared: more images for both did more than disjoint ones (experiments/cifar_resnet20).
    parts = {"search": searched, "refine": searched, "select": selected}
    size = (settings.batch_size or EASY_BATCH_SIZE) if samples.uniform else 1
    known = sorted(searched)
    skipped = left_out(model, space)
    first = samples.batch(known[:size])
    prepared = prepare(
        model,
        to_device(_shown(samples, known, settings, size), home(model)),
        skip=lambda name: name in skipped,
        optional=[name for name, wanted in _OPTIONAL.items() if wanted(settings)],
        bits=_least_bits(model, space),
    )
    prepared.model.to(device)
    with torch.no_grad():
        output = first_tensor(call_model(prepared.model, to_device(first, device)))
    distance = settings.distance or default_distance(output)
    supernet = Supernet(prepared.model, space).to(device)
    journal = Journal.open(None if folder is None or rank() else folder / JOURNAL)
    evaluator = Evaluator(supernet, samples, parts, distance, size, device, Meter(), journal, teacher=teacher)
    runs = batches(known, evaluator.forward_size)
    with reporter.stage("calibrate", len(known)) as stage:

        def keep(position: int, output: Any) -> None:
            indices = runs[position]
            if not torch.isfinite(first_tensor(output)).all():
                raise NonFiniteError("the float model's output is NaN or infinite on the calibration inputs")
            if teacher is None:
                evaluator.keep_reference(indices, output)
            evaluator.meter.forward(len(indices))
            stage.advance(len(indices))

        inputs = (to_device(samples.batch(run), device) for run in runs)
        supernet.calibrate(inputs, keep, evaluator.probes(known), distance)
    if space.points:
        evaluator.meter.forward(len(runs[0]))
    if space.ties or space.found_ties:
        tie(supernet, to_device(samples.batch(known[:1]), device))
        evaluator.meter.forward(1)
    if folder is not None:
        search_identity(prepared, samples, supernet, settings, distance, seed).check(journal)
    return prepared, evaluator


def _least_bits(model: nn.Module, space: SearchSpace) -> Bits:
    """The fewest bits that each layer's weight and input may get."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for name, (_, info) in searchable_layers(model).items():
        given = space.candidates(replace(info, name=canonical_name(model, name)))
        if given is not None:
            weight, activation = (
                min((candidate.spec.bits for candidate in side), default=None)
                for side in (given.weight, given.activation)
            )
            found[canonical_name(model, name)] = weight, activation
    return lambda name: found.get(name, (None, None))


def _shown(samples: Samples, known: list[int], settings: PTQSettings, size: int) -> Any:
    """What the preparation is watched with: more where it takes ranges from it."""
    wide = settings.smooth and samples.uniform
    return samples.batch(known[: max(size, SMOOTHED_INPUTS) if wide else size])


def limits_of(budget: Budget | None, evaluator: Evaluator) -> Limits | None:
    """A budget on a calibrated supernet, whose work one input shows; None where nothing is limited.

    Raises:
        BudgetError: where no assignment keeps all limits.
    """
    if budget is None or not budget.given():
        return None
    one = evaluator.samples.batch(evaluator.parts["search"][:1])
    evaluator.meter.forward(1)
    return budget.on(evaluator.supernet, watch(evaluator.supernet, to_device(one, evaluator.device)))


def left_out(model: nn.Module, space: SearchSpace) -> set[str]:
    """Names of the layers that stay in float, as they are once ``prepare`` has unwrapped them."""
    layers = (
        replace(info, name=canonical_name(model, name))
        for name, (_, info) in searchable_layers(model).items()
    )
    return {info.name for info in layers if space.candidates(info) is None}
