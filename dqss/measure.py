"""Measuring discrete networks: mean distance to the float network, memoized and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dqss.calls import call_model
from dqss.curvature import watching
from dqss.io import Journal
from dqss.losses import Distance
from dqss.precision import full_precision
from dqss.samples import Samples
from dqss.sensitivity import GROUP, PASSES, SOFTER_PASSES, Estimates, second_order
from dqss.supernet import Assignment, Supernet

FORWARD_FACTOR = 4
"""How many times the images a pass takes that goes forward alone."""
PROBES = 64
"""Inputs whose gradients are taken where a candidate weighs errors by them."""


@dataclass
class Meter:
    """Counts evaluations: one image forward is 1, forward and backward 3 (everything counts)."""

    evaluations: int = 0

    def forward(self, images: int) -> None:
        """Count a forward pass."""
        self.evaluations += images

    def backward(self, images: int) -> None:
        """Count a forward and a backward pass."""
        self.evaluations += 3 * images


class Metric(Protocol):
    """A task metric in the manner of torchmetrics."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""

    def compute(self) -> Any:
        """The value so far."""


MetricFactory = Callable[[], Metric]
Context = Callable[[], AbstractContextManager[None]]
Variants = Mapping[str, Context | None]
"""In what to run a supernet, by name; None stands for the float network itself."""


@dataclass
class Evaluator:
    """Runs assignments on named parts of the calibration samples.

    Args:
        supernet: calibrated.
        samples: all calibration inputs.
        parts: indices into ``samples`` by name (search, refine, select).
        distance: to the float network.
        batch_size: images at a time, forward and backward; see also :attr:`forward_size`.
        device: where the supernet is.
        meter: what counts evaluations.
        journal: remembers every measured value, so that a resumed run repeats none.
        advance: told of each measurement's images beforehand; may raise to stop.
        teacher: the float network, where the supernet in float is another one; None: that is it.
        references: float outputs by sample index, on the CPU: what the distance reads of them, and
            nothing else of the float network. The inputs that are searched on leave theirs when
            they are calibrated with, the others when they are first measured on; no step of the
            search and no measurement runs the float network again.
    """

    supernet: Supernet
    samples: Samples
    parts: Mapping[str, Sequence[int]]
    distance: Distance
    batch_size: int
    device: torch.device
    meter: Meter
    journal: Journal
    advance: Callable[[int], None] = lambda images: None
    references: dict[int, Tensor] = field(default_factory=dict)
    teacher: torch.nn.Module | None = None

    @property
    def forward_size(self) -> int:
        """Images at a time, forward alone: what is kept for the way back takes the most memory."""
        return self.batch_size * FORWARD_FACTOR if self.samples.uniform else 1

    def keep_reference(self, indices: Sequence[int], output: Any) -> None:
        """Remember the float network's ``output`` for a batch of ``indices``."""
        for index, row in zip(indices, self.distance.read(output).detach().cpu(), strict=True):
            self.references[index] = row

    def probes(self, indices: Sequence[int], count: int = PROBES) -> Iterator[Any]:
        """Single inputs for a pass forward and backward, counted as they are taken.

        They are spread evenly over ``indices``, which may be in the order of their classes.
        """
        count = min(count, len(indices))
        for position in range(count):
            self.meter.backward(1)
            yield to_device(self.samples.batch([indices[position * len(indices) // count]]), self.device)

    @torch.no_grad()
    def reference(self, indices: Sequence[int]) -> Tensor:
        """Float outputs of ``indices``, ``[N, ...]``, computed once each."""
        missing = [index for index in indices if index not in self.references]
        for batch in batches(missing, self.forward_size):
            self.keep_reference(batch, self._float(batch))
            self.meter.forward(len(batch))
        return torch.stack([self.references[index] for index in indices]).to(self.device)

    def measure(self, assignment: Assignment, part: str, count: int | None = None) -> float:
        """Mean distance of the discrete network on (the first ``count`` images of) a part."""
        each = self.measure_each(assignment, part, count)
        return sum(each) / len(each)

    def measure_each(self, assignment: Assignment, part: str, count: int | None = None) -> list[float]:
        """Distance of the discrete network on each of (the first ``count``) images of a part."""
        indices = self.parts[part][:count]
        self.advance(len(indices))
        key = _key("discrete", assignment, part, len(indices))
        known = self.journal.get(key)
        if known is None:
            known = {"each": self._each(lambda: self.supernet.assign(assignment), indices)}
            self.journal.put(key, known)
        self.meter.forward(len(indices))
        each: list[float] = known["each"]
        return each

    def measure_in(self, context: Context, part: str) -> list[float]:
        """Distance of each image of a part, in whatever network the supernet is inside ``context``."""
        self.meter.forward(len(self.parts[part]))
        return self._each(context, self.parts[part])

    def measure_soft(self, part: str) -> float:
        """Mean distance of the relaxed network, as it stands, on a part."""
        each = self.measure_in(lambda: self.supernet.mode("relaxed"), part)
        return sum(each) / len(each)

    def first_order(self, assignment: Assignment, part: str, count: int | None = None) -> dict[str, Tensor]:
        """First-order effect of switching each decision to each option, ``[K]`` a decision.

        One forward and backward pass of the discrete network gives all of them:
        ``effect[k] = dL/dw_k - dL/dw_choice`` where ``w`` are the one-hot mixture weights.
        """
        indices = self.parts[part][:count]
        decisions = self.supernet.decisions
        for decision in decisions.values():
            decision.logits.grad = None  # what the last step of a search left there
        with self.supernet.pinned(assignment):
            for batch in batches(indices, self.batch_size):
                reference = self.reference(batch)
                per_sample = self.distance.per_sample(self.distance.read(self._run(batch)).float(), reference)
                (per_sample.sum() / len(indices)).backward()  # type: ignore[no-untyped-call]
            effects = {name: _take_gradient(decision.logits) for name, decision in decisions.items()}
        self.meter.backward(len(indices))
        return {name: effect - effect[assignment[name]] for name, effect in effects.items()}

    def second_order(
        self,
        assignment: Assignment,
        part: str,
        count: int | None = None,
        group: int = GROUP,
        alone: bool = False,
    ) -> Estimates:
        """Effect of switching each decision to each option, to second order.

        What an option adds of its own is in it, see :mod:`dqss.sensitivity`: where options differ in
        bits that is nearly all there is. On (the first ``count`` images of) a part, ``group`` images a pass;
        with ``alone`` also the effects without slopes, by the distance and a softer one.
        """
        indices = self.parts[part][:count]
        groups = batches(indices, min(group, self.batch_size))
        softer = self.distance.softer() if alone else None
        watched = watching(self.supernet) if alone else nullcontext()
        with self.supernet.pinned(assignment), watched as curvature:
            found = second_order(
                self._run,
                self.reference,
                self.distance,
                self.supernet.decisions,
                assignment,
                groups,
                curvature,
                softer,
            )
        self.meter.evaluations += (PASSES + (SOFTER_PASSES if softer else 0)) * len(indices)
        return found

    def _float(self, indices: Sequence[int]) -> Any:
        if self.teacher is not None:
            return call_model(self.teacher, to_device(self.samples.batch(indices), self.device))
        with self.supernet.mode("float"):
            return self._run(indices)

    def _run(self, indices: Sequence[int]) -> Any:
        return call_model(self.supernet, to_device(self.samples.batch(indices), self.device))

    @torch.no_grad()
    def _each(self, context: Context, indices: Sequence[int]) -> list[float]:
        found: list[float] = []
        for batch in batches(indices, self.forward_size):
            reference = self.reference(batch)
            with context():
                output = self.distance.read(self._run(batch)).float()
            found += self.distance.per_sample(output, reference).double().tolist()
        return found


def measure_stream(
    supernet: Supernet,
    loader: Iterable[tuple[Any, Tensor | None]],
    variants: Variants,
    distance: Distance,
    metric: MetricFactory | None,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Measure several variants of a supernet side by side in one pass over ``loader``.

    See :func:`measure_networks`; ``variants`` are contexts in which to run the supernet.
    """

    def run_in(context: Context) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            with context():
                return call_model(supernet, inputs)

        return run

    networks = {name: None if context is None else run_in(context) for name, context in variants.items()}
    reference = run_in(lambda: supernet.mode("float"))
    return measure_networks(reference, loader, networks, distance, metric, device, advance)


@full_precision()
@torch.no_grad()
def measure_networks(
    reference: Callable[[Any], Any],
    loader: Iterable[tuple[Any, Tensor | None]],
    networks: Mapping[str, Callable[[Any], Any] | None],
    distance: Distance,
    metric: MetricFactory | None,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Measure several networks side by side in one pass over ``loader``.

    Each batch goes through the reference once, whose output all networks are compared with.

    Args:
        reference: inputs to the output that distances are taken to.
        loader: ``(inputs, targets)``; targets may be None.
        networks: what to measure, by name; None stands for the reference itself.
        distance: to the reference.
        metric: makes a task metric, or None.
        device: where the networks are.
        advance: told of each batch's images.

    Returns:
        For each network ``distance``, ``metric`` (where there are targets) and ``count``.
    """
    totals = dict.fromkeys(networks, 0.0)
    metrics = {name: metric() for name in networks} if metric else {}
    count, labelled = 0, False
    for inputs, targets in loader:
        inputs = to_device(inputs, device)
        wanted = distance.read(reference(inputs)).float()
        for name, run in networks.items():
            output = wanted if run is None else distance.read(run(inputs)).float()
            totals[name] += float(distance.per_sample(output, wanted).double().sum())
            if targets is not None and metrics:
                metrics[name].update(output.cpu(), targets.cpu())
                labelled = True
        count += len(wanted)
        advance(len(wanted))
    results: dict[str, dict[str, float]] = {}
    for name in networks:
        results[name] = {"distance": totals[name] / max(count, 1), "count": count}
        if labelled:
            results[name]["metric"] = float(metrics[name].compute())
    return results


def batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """``indices`` in runs of ``size``; the last may be shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def count_of(loader: Iterable[Any]) -> int:
    """Images in a loader, as far as it says."""
    dataset = getattr(loader, "dataset", ())
    return len(dataset) if isinstance(dataset, Sized) else 0


def home(model: torch.nn.Module) -> torch.device:
    """Where a model's tensors are; the CPU for one that has none."""
    tensor = next((t for kind in (model.parameters(), model.buffers()) for t in kind), None)
    return torch.device("cpu") if tensor is None else tensor.device


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move every tensor of a pytree."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), inputs)


def _take_gradient(logits: torch.nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad.clone()
    logits.grad = None
    return gradient


def _key(kind: str, assignment: Assignment, part: str, count: int) -> str:
    text = json.dumps([kind, sorted(assignment.items()), part, count])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
