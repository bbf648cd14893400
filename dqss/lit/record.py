"""What a finished search leaves for its report: gathered once, from what is already there."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from math import isfinite, nan
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from dqss.attach import original_weight
from dqss.decision import Decision
from dqss.discretize import Discretized
from dqss.lit.examples import FLOAT, SEARCHED, UNIFORM, most_changed, shows_pictures
from dqss.measure import Context, Evaluator
from dqss.mixed import MixedQuantizer
from dqss.mixing import Grid
from dqss.observers.coarse import CoarseHistogram
from dqss.points import SearchablePoint
from dqss.products import SearchableProduct
from dqss.report.record import ClipRange, DecisionRecord, Gain, Histogram, RunRecord, TensorRecord
from dqss.spec import Candidate
from dqss.supernet import Assignment, Supernet

PROBED = 32
"""Inputs for the first-order effects, where the search has learned none itself."""
_PACKAGES = ("torch", "pytorch-lightning", "timm", "torchvision", "numpy")


def record(
    evaluator: Evaluator,
    outcome: Discretized,
    learned: Mapping[str, Tensor],
    loss: str,
    images: int,
    network: nn.Module | None = None,
) -> RunRecord:
    """Gather what the report shows beside strategy, metrics and history.

    Takes two or three forward passes over ``images`` inputs, and where nothing was ``learned``
    one pass forward and backward over a few.

    Args:
        evaluator: of the search, at its end.
        outcome: what was found.
        learned: effect of each decision's options, see :meth:`dqss.lit.mean_field.MeanField.learned`.
        loss: name of what was minimized.
        images: how many inputs the report shows.
        network: what is exported, where that was tuned after the search.
    """
    chosen = outcome.assignments[outcome.exported]
    effects = learned or evaluator.first_order(chosen, "refine", PROBED)
    supernet = evaluator.supernet
    contexts = _contexts(supernet, outcome)
    if network is None:
        distances = evaluator.measure_each(chosen, "select")
    else:
        contexts[SEARCHED] = lambda: supernet.running(network)
        distances = evaluator.measure_in(contexts[SEARCHED], "select")
    return RunRecord(
        versions=_versions(evaluator.device),
        effects="mean_field" if learned else "first_order",
        loss=loss,
        gain=_gain(evaluator, outcome, distances),
        pictures=shows_pictures(evaluator),
        tensors=list(_tensors(supernet)),
        decisions={
            name: _decision(decision, effects[name], chosen[name])
            for name, decision in supernet.decisions.items()
        },
        distances=[value if isfinite(value) else None for value in distances],
        examples=most_changed(evaluator, _finite(distances), contexts, images),
    )


def training_record(
    supernet: Supernet, chosen: Assignment, learned: Mapping[str, Tensor], loss: str, device: torch.device
) -> RunRecord:
    """The same of a QAT search, in which networks change: no single inputs, no effects but learned ones.

    Args:
        supernet: at the end; what was not chosen is as the search left it.
        chosen: the exported assignment.
        learned: as for :func:`record`.
        loss: name of what was minimized.
        device: that it ran on.
    """
    unknown = torch.tensor(nan)
    return RunRecord(
        versions=_versions(device),
        effects="mean_field" if learned else "unknown",
        loss=loss,
        gain=None,
        pictures=False,
        tensors=list(_tensors(supernet)),
        decisions={
            name: _decision(decision, learned.get(name, unknown[None]), chosen[name])
            for name, decision in supernet.decisions.items()
        },
        distances=[],
        examples=[],
    )


def clip_range(grid: Grid) -> ClipRange:
    """The real values that a grid's smallest and largest codes stand for."""
    low = (grid.spec.qmin - grid.zero_point) * grid.scale
    high = (grid.spec.qmax - grid.zero_point) * grid.scale
    return ClipRange(
        low=float(low.median()), high=float(high.median()), lowest=float(low.min()), highest=float(high.max())
    )


def _tensors(supernet: Supernet) -> Iterator[TensorRecord]:
    for name, layer in supernet.layers.items():
        kind = layer.info.types[0]
        if layer.weight is not None:
            weight = original_weight(layer.module)
            values = CoarseHistogram.of_values(weight)
            yield _tensor(name, "weight", kind, list(weight.shape), layer.weight, values)
        if layer.activation is not None:
            yield _tensor(name, "activation", kind, [], layer.activation, layer.activation.histogram)
    both: dict[str, SearchableProduct | SearchablePoint] = {**supernet.products, **supernet.points}
    for name, each in both.items():
        for operand, quantizer in each.operands():
            yield _tensor(name, operand, each.kind, [], quantizer, quantizer.histogram)


def _tensor(
    layer: str,
    role: str,
    kind: str,
    shape: list[int],
    quantizer: MixedQuantizer,
    histogram: CoarseHistogram | None,
) -> TensorRecord:
    seen = None
    if histogram is not None:
        counts = list(histogram.counts)
        seen = Histogram(low=histogram.low, high=histogram.high, counts=counts, zeros=histogram.zeros)
    return TensorRecord(
        layer=layer,
        role=role,
        kind=kind,
        shape=shape,
        decision=quantizer.decision.name,
        histogram=seen,
        ranges=[clip_range(quantizer[k].grid()) for k in range(len(quantizer.candidates))],
    )


def _decision(decision: Decision, effects: Tensor, chosen: int) -> DecisionRecord:
    options = [option for option in decision.options if isinstance(option, Candidate)]
    known = [float(value) for value in effects]
    return DecisionRecord(
        labels=[option.label for option in options],
        schemes=[option.spec.scheme for option in options],
        outcome=[int(number) for number in decision.outcome],
        probabilities=decision.probabilities(),
        effects=known if all(map(isfinite, known)) else None,
        preferred=int(decision.logits.detach().argmax()),
        chosen=chosen,
    )


def _gain(evaluator: Evaluator, outcome: Discretized, distances: list[float]) -> Gain | None:
    if outcome.best_uniform is None:
        return None
    uniform = evaluator.measure_each(outcome.assignments[outcome.best_uniform], "select")
    gains = [before - after for before, after in zip(uniform, distances, strict=True)]
    if not all(map(isfinite, gains)):
        return None
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return Gain(mean=mean(gains), error=error, count=len(gains))


def _contexts(supernet: Supernet, outcome: Discretized) -> dict[str, Context]:
    def assigned(assignment: Assignment) -> Context:
        return lambda: supernet.assign(assignment)

    contexts: dict[str, Context] = {FLOAT: lambda: supernet.mode("float")}
    if outcome.best_uniform is not None and outcome.best_uniform != outcome.exported:
        contexts[UNIFORM] = assigned(outcome.assignments[outcome.best_uniform])
    return {**contexts, SEARCHED: assigned(outcome.assignments[outcome.exported])}


def _finite(distances: list[float]) -> list[float]:
    """Those that are not finite as the largest there is: JSON has no word for them."""
    return [value if isfinite(value) else torch.finfo(torch.float64).max for value in distances]


def _versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(terse=True),
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
    }
