"""The steps of an export in their order: simulate, trace, lower, tidy, compare, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from torch import nn

from dqss.apply import apply_strategy
from dqss.arithmetic import EXACT, FAKE_QUANTIZED, Arithmetic, IntegerKernels
from dqss.bundle import Bundle
from dqss.deploy.biases import quantize_biases
from dqss.deploy.compared import Parity, PartParity
from dqss.deploy.function import quietly
from dqss.deploy.grids import Grids
from dqss.deploy.lower import Lowered, lower
from dqss.deploy.marks import Marked
from dqss.deploy.parity import Comparison
from dqss.deploy.pools import pool_means
from dqss.deploy.report import ExportReport
from dqss.deploy.runtime import kernels_of
from dqss.deploy.sizes import sizes_of
from dqss.deploy.tidy import tidy
from dqss.deploy.tolerance import Tolerance
from dqss.deploy.trace import trace
from dqss.deploy.work import BATCH, PART_BATCH, Meters, Options, check_precision, float_network, makes_images
from dqss.errors import ExportError
from dqss.io import ensure_folder, write_bytes_atomic
from dqss.measure import batches
from dqss.progress import Stage
from dqss.samples import Samples

LIMIT = 2**31 - 1
"""Bytes that fit into one file of this format."""


def export(model: nn.Module, bundle: Bundle, path: Path, samples: Samples, options: Options) -> ExportReport:
    """See :func:`dqss.deploy.export.export_model`."""
    ensure_folder(path.parent)
    arithmetic = options.target.arithmetic_of(bundle.strategy)
    work = _traced(model, bundle, samples, options, arithmetic)
    found, notes = work.build(()), list[str]()
    astray = [row.part for row in found.parts if not row.within(options.tolerance)]
    if astray and arithmetic != FAKE_QUANTIZED:
        form = ", and written as the pattern that converters look for" if arithmetic == EXACT else ""
        notes.append(
            f"compared with the fake-quantized simulation{form}: "
            f"a simulation in {arithmetic} does not follow the file at {astray[0]}"
        )
        work = _traced(model, bundle, samples, options, FAKE_QUANTIZED)
        found = work.build(())
    coarse = found.coarse(options.tolerance)
    if coarse:
        found = work.build(coarse)
        notes.append(
            f"in float, since whole units of its accumulator round its bias too much: {', '.join(coarse)}"
        )
    if options.target.points and not bundle.strategy.points:
        notes.append(
            f"the strategy has no points, which a search with target={options.target.name} puts where it "
            "needs them: a convolution before an addition, a concatenation or an average runs in float"
        )
    if not options.target.tried:
        notes.append(f"no file for {options.target.name} has been run by us")
    data = _serialized(found.graph)
    fake = None
    if work.arithmetic != FAKE_QUANTIZED:
        fake = apply_strategy(model, bundle, force=options.force).cpu()
    parity, metric = work.compare(data, float_network(model, bundle, samples.batch([0])), found, fake)
    if options.watch is not None:
        options.watch(parity)
    parity.check(options.tolerance)
    grids = work.grids
    scales = {name: len(grids.scale(name)) for name in grids.choices()}
    report = ExportReport(
        path=path,
        target=options.target.name,
        parity=parity,
        kernels=kernels_of(data),
        sizes=sizes_of(len(data), work.simulation, bundle.strategy, scales),
        containers=_containers(grids, found.lowered),
        clipped=len(found.lowered.clipped),
        open_axes=_open_axes(found.graph),
        metric=metric,
        notes=tuple(notes),
    )
    write_bytes_atomic(path, data)
    return report


def _traced(
    model: nn.Module, bundle: Bundle, samples: Samples, options: Options, arithmetic: Arithmetic
) -> _Work:
    simulation = apply_strategy(model, bundle, options.force, arithmetic).cpu()
    check_precision(simulation)
    with options.reporter.stage("trace", 1) as stage:
        work = _Work(simulation, arithmetic, bundle, samples, options)
        stage.advance()
    return work


@dataclass(frozen=True)
class _Built:
    """A graph, and how each of its parts compares."""

    graph: ir.Model
    lowered: Lowered
    parts: list[PartParity]

    def coarse(self, tolerance: Tolerance) -> list[str]:
        """Layers of parts that are off by single steps, but too often: see :mod:`dqss.deploy.biases`."""
        rows = [row for row in self.parts if row.part.call is not None and not row.within(tolerance)]
        near = [row for row in rows if row.largest <= tolerance.steps]
        return list(dict.fromkeys(module for row in near for module in row.part.modules))


class _Work:
    """A traced network, of which files are built and compared."""

    def __init__(
        self,
        simulation: nn.Module,
        arithmetic: Arithmetic,
        bundle: Bundle,
        samples: Samples,
        options: Options,
    ) -> None:
        self.simulation, self.arithmetic = simulation, arithmetic
        self.bundle, self.samples, self.options = bundle, samples, options
        marked = Marked(simulation, bundle.strategy)
        self.grids, self.size = Grids(bundle), BATCH if samples.uniform else 1
        # Two at least: an axis of one would be taken for a constant.
        pair = samples.batch([0, min(1, len(samples) - 1)] if samples.uniform else [0, 0])
        open_size = options.dynamic_size
        open_size = makes_images(marked, pair) if open_size is None else open_size
        self.traced, signature = trace(marked, pair, open_size)
        if not any(0 in axes for axes in _open_axes(self.traced).values()):
            # Its forward fixes how many inputs there are: then one.
            self.size = 1
            self.traced, signature = trace(marked, samples.batch([0]), open_size)
        self.comparison = Comparison(marked, signature, options.threads)
        self.few = min(options.part_inputs, len(samples))

    def build(self, in_float: Collection[str]) -> _Built:
        """A graph whose layers of these names are computed in float."""
        graph = self.traced.clone()
        lowered = lower(graph, self.grids, self.options.target, in_float, self.arithmetic == EXACT)
        if self.options.target.bias == "int32":
            quantize_biases(graph)
        if isinstance(self.options.target.arithmetic, IntegerKernels):
            pool_means(graph)
        with quietly():
            tidy(graph, self.bundle, target=self.options.target.name, arithmetic=str(self.arithmetic))
        with self.options.reporter.stage("parts", self.few) as stage:
            parts = self.comparison.parts(graph, lowered, self._batches(self.few, PART_BATCH, stage))
        return _Built(graph, lowered, parts)

    def compare(
        self, data: bytes, exact: nn.Module, built: _Built, fake: nn.Module | None
    ) -> tuple[Parity, dict[str, float]]:
        """A file against the simulation, and the task metric of both.

        ``fake`` is the fake-quantized simulation, where that is another.
        """
        meters = Meters(self.options.metric, self.samples, self.size)
        count = len(self.samples)
        with self.options.reporter.stage("compare", count) as stage:
            inputs = self._batches(count, self.size, stage)
            whole, distance = self.comparison.whole(data, exact, inputs, meters.seen, fake)
        runtime = f"onnxruntime {ort.__version__}"
        parity = Parity(whole, tuple(built.parts), self.few, runtime, str(self.arithmetic), distance)
        return parity, meters.values()

    def _batches(self, count: int, size: int, stage: Stage) -> Iterator[Any]:
        for run in batches(range(count), min(size, self.size)):
            yield self.samples.batch(run)
            stage.advance(len(run))


def _serialized(graph: ir.Model) -> bytes:
    proto = ir.to_proto(graph)
    if proto.ByteSize() > LIMIT:
        raise ExportError("the network takes more than 2 GiB, which one ONNX file cannot hold")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the ONNX checker refuses the graph: {' '.join(str(error).split())[:200]}"
        ) from error
    # Shapes between nodes are inferred from the rest; one file in 25 bytes is made of them.
    proto.graph.ClearField("value_info")
    found: bytes = proto.SerializeToString()
    return found


def _containers(grids: Grids, lowered: Lowered) -> dict[str, Counter[tuple[int, str]]]:
    found = {"weights": Counter[tuple[int, str]](), "activations": Counter[tuple[int, str]]()}
    for name, choice in grids.choices().items():
        if name in lowered.held:
            role = "weights" if name.endswith(".weight") else "activations"
            found[role][choice.bits, lowered.held[name].container.name] += 1
    return found


def _open_axes(graph: ir.Model) -> dict[str, tuple[int, ...]]:
    return {
        str(value.name): tuple(
            axis for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)
        )
        for value in graph.graph.inputs
    }
