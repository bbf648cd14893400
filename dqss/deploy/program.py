"""A strategy as a program of torch: ``torch.export``, with nothing of this package in it.

Such a program is a graph of torch's own operators and the tensors that they read. It runs wherever
torch does, without the network's code and without dqss. Weights are integers in it, a byte each up to eight
bits; activations are rounded to their grids in floating point, as in the simulation.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from dqss.apply import apply_strategy, weight_codes
from dqss.attach import attach_weight
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor, tensors_in
from dqss.deploy.compared import Parity, Part, PartParity, Total, Whole
from dqss.deploy.function import OfTensors, axes, first_words, quietly, tensors_of
from dqss.deploy.marks import ActivationMark, Call, Marked
from dqss.deploy.sizes import Sizes, sizes_of
from dqss.deploy.targets import GENERIC
from dqss.deploy.tolerance import DEFAULT, Tolerance
from dqss.deploy.work import BATCH, PART_BATCH, Meters, Options, check_precision, float_network, makes_images
from dqss.errors import ExportError
from dqss.functional import dequantize, quantize
from dqss.io import StrPath, ensure_folder, write_bytes_atomic
from dqss.measure import batches
from dqss.mixing import Codes, Grid
from dqss.progress import Reporter, Stage
from dqss.quantizers import Quantizer
from dqss.samples import Samples

RUNTIME = "torch"


class _Rounds(nn.Module):
    """A quantizer as what it computes, in torch's own words."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.spec = grid.spec
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = Grid(self.scale, self.zero_point, self.spec).shaped(x.shape)
        return dequantize(quantize(x, scale, zero_point, self.spec), scale, zero_point)


class _Restores(_Rounds):
    """Integers as the weight that they stand for."""

    def forward(self, codes: Tensor) -> Tensor:
        return Codes(codes, Grid(self.scale, self.zero_point, self.spec)).dequantize()


@dataclass(frozen=True)
class ProgramReport:
    """What was written, and what was measured before.

    Attributes:
        path: the file.
        parity: the program against the simulation, both in torch.
        sizes: of the file.
        metric: the task metric of simulation and program on the same inputs; empty without targets.
    """

    path: Path
    parity: Parity
    sizes: Sizes
    metric: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"size: {self.sizes}"
        integer = [row for row in self.parity.parts if row.part.call is not None]
        if integer:
            worst, steps = self.parity.worst(), max(row.largest for row in integer)
            yield (
                f"layer by layer: at most {steps:.0f} steps on at most {worst.share:.2%} of the values "
                f"({worst.part}), on {self.parity.part_count} inputs"
            )
        yield f"end to end: {self.parity.whole}"

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": "torch",
            "bytes": self.sizes.summary(),
            "parity": self.parity.summary(),
            "metric": self.metric,
        }


def export_program(
    model: nn.Module,
    bundle: Bundle,
    path: StrPath,
    inputs: Samples | Tensor | Iterable[Any],
    *,
    dynamic_size: bool | None = None,
    tolerance: Tolerance = DEFAULT,
    part_inputs: int = 32,
    metric: Callable[[], Any] | None = None,
    watch: Callable[[Parity], None] | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> ProgramReport:
    """Write the quantized network as a program of ``torch.export``, after comparing it with the simulation.

    ``torch.export.load(path).module()`` is called with the tensors of a batch, in their order, and returns
    a tuple of the output's tensors; it needs torch alone.

    Args:
        model: the trained float network, as it was given to the search; fp32.
        bundle: from :func:`dqss.load` or a search.
        path: of the file, ``.pt2`` by custom; its folder is made if need be.
        inputs: real ones, as the search takes them.
        dynamic_size: leave height and width of images open; by default where images come out.
        tolerance: how far the program may be off.
        part_inputs: the parts are compared on so many of the inputs.
        metric: makes a task metric, for ``inputs`` with targets.
        watch: is shown the comparison before it is judged.
        force: apply the strategy also to other weights.
        reporter: progress; silent by default.

    Returns:
        What was written and measured.

    Raises:
        ExportError: where the network cannot be traced.
        ParityError: where the program gives other answers; it names the first part that differs.
        StrategyError: for another model.
        OutputError: where the file cannot be written.
    """
    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    shown = reporter or Reporter()
    options = Options(GENERIC, dynamic_size, tolerance, part_inputs, metric, watch, 1, force, shown)
    return _export(model, bundle, Path(path), samples, options)


def _export(
    model: nn.Module, bundle: Bundle, path: Path, samples: Samples, options: Options
) -> ProgramReport:
    ensure_folder(path.parent)
    simulation = apply_strategy(model, bundle, force=options.force).cpu()
    check_precision(simulation)
    with options.reporter.stage("trace", 1) as stage:
        program, size = _traced(_plain(simulation, bundle), samples, options.dynamic_size)
        stage.advance()
    comparison = _Comparison(Marked(simulation, bundle.strategy), samples, size, options)
    parts = comparison.parts(program)
    data = _serialized(program)
    exact = float_network(model, bundle, samples.batch([0]))
    whole, metric = comparison.whole(torch.export.load(io.BytesIO(data)).module(), exact)
    parity = Parity(whole, tuple(parts), comparison.few, f"torch {torch.__version__}")
    if options.watch is not None:
        options.watch(parity)
    parity.check(options.tolerance)
    scales = {
        f"{n}.{role}": len(bundle.tensors[f"{n}.{role}.scale"]) for n, role, _ in bundle.strategy.choices()
    }
    report = ProgramReport(path, parity, sizes_of(len(data), simulation, bundle.strategy, scales), metric)
    write_bytes_atomic(path, data)
    return report


def _plain(simulation: nn.Module, bundle: Bundle) -> nn.Module:
    """A copy of the simulation that calls torch's own operators alone, with integers for weights."""
    network = copy.deepcopy(simulation)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Quantizer):
                setattr(module, name, _Rounds(child.grid()))
    modules = dict(network.named_modules())
    for name, layer in bundle.strategy.layers.items():
        if layer.weight is not None:
            weight: Tensor = modules[name].weight
            codes = weight_codes(bundle, name, weight)
            if not torch.equal(codes.dequantize(), weight):
                raise ExportError(f"layer {name!r}: the weight is not on its grid")
            modules[name].weight = nn.Parameter(codes.integers, requires_grad=False)
            attach_weight(modules[name], _Restores(codes.grid))
    return network.eval()


def _traced(network: nn.Module, samples: Samples, dynamic_size: bool | None) -> tuple[ExportedProgram, int]:
    """The program, and how many inputs it takes at a time."""
    # Two at least: an axis of one would be taken for a constant.
    pair = samples.batch([0, min(1, len(samples) - 1)] if samples.uniform else [0, 0])
    open_size = makes_images(network, pair) if dynamic_size is None else dynamic_size
    program = _trace(network, pair, open_size)
    if _any_count(program):
        return program, BATCH if samples.uniform else 1
    # Its forward fixes how many inputs there are: then one.
    return _trace(network, samples.batch([0]), open_size), 1


def _trace(network: nn.Module, batch: Any, open_size: bool) -> ExportedProgram:
    tensors = tensors_of(batch)
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(
                OfTensors(network, batch),
                tuple(tensors),
                dynamic_shapes=(tuple(axes(tensor, open_size) for tensor in tensors),),
                strict=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch cannot trace this network ({first_words(error)}); "
            "the simulation runs without a trace: apply_strategy"
        ) from error


def _any_count(program: ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    found = (node.meta["val"] for node in program.graph.nodes if node.name in names)
    # A size that turned out to be fixed may still look like a symbol, of the name ``2``.
    return any(isinstance(x, Tensor) and x.ndim and not str(x.shape[0]).isdigit() for x in found)


def _serialized(program: ExportedProgram) -> bytes:
    """Without the inputs it was traced with, traces of the machine it was made on, and of this package."""
    arguments, keywords = program.example_inputs
    program._example_inputs = tuple(torch.zeros_like(tensor) for tensor in arguments), keywords
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(key, None)
    file = io.BytesIO()
    with quietly():
        torch.export.save(program, file)
    return file.getvalue()


class _Comparison:
    """Programs beside the simulation."""

    def __init__(self, marked: Marked, samples: Samples, size: int, options: Options) -> None:
        self.marked, self.samples, self.size, self.options = marked, samples, size, options
        self.few = min(options.part_inputs, len(samples))

    @torch.no_grad()
    def parts(self, program: ExportedProgram) -> list[PartParity]:
        """Every part, fed what the simulation has there."""
        module: Any = program.module()
        marks = {n: m for n, m in self.marked.network.named_modules() if isinstance(m, ActivationMark)}
        grids = {mark.name: mark.quantizer.grid() for mark in marks.values()}
        ends = _ends(module.graph, {path: mark.name for path, mark in marks.items()})
        if marks and not ends:
            raise ExportError("this release of torch does not say where in a program its modules are")
        totals: dict[Part, Total] = {}
        with self.options.reporter.stage("parts", self.few) as stage:
            for batch in self._batches(self.few, PART_BATCH, stage):
                with self.marked.notes.keeping_codes():
                    outputs = list(tensors_in(call_model(self.marked, batch)))
                    codes = dict(self.marked.notes.codes or {})
                results = _Fed(module, ends, grids, codes, totals).run(*tensors_of(batch))
                for index, (wanted, found) in enumerate(zip(outputs, results, strict=True)):
                    part = Part(f"output {index}", ())
                    totals.setdefault(part, Total()).add(wanted.numpy(), found.numpy(), False)
        return [total.result(part) for part, total in totals.items()]

    @torch.no_grad()
    def whole(self, program: nn.Module, exact: nn.Module) -> tuple[Whole, dict[str, float]]:
        """The whole network, and the task metric of both."""
        total, count = Whole(), len(self.samples)
        meters = Meters(self.options.metric, self.samples, self.size, RUNTIME)
        with self.options.reporter.stage("compare", count) as stage:
            for batch in self._batches(count, self.size, stage):
                tensors, outputs = tensors_of(batch), call_model(self.marked, batch)
                wanted = first_tensor(outputs)
                position = next(i for i, output in enumerate(tensors_in(outputs)) if output is wanted)
                found = program(*tensors)[position]
                total.add(len(tensors[0]), first_tensor(call_model(exact, batch)), wanted, found)
                meters.seen(wanted, found)
        return total, meters.values()

    def _batches(self, count: int, size: int, stage: Stage) -> Iterator[Any]:
        for run in batches(range(count), min(size, self.size)):
            yield self.samples.batch(run)
            stage.advance(len(run))


def _ends(graph: fx.Graph, names: Mapping[str, str]) -> dict[fx.Node, Call]:
    """The last node of every call of a quantizer, by the module that it was traced in."""
    last: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
                name = names.get(str(path).removeprefix("network."))
                if name is not None:
                    last[f"{name}@{key.rpartition('@')[2] if '@' in key else 0}"] = node
    found: dict[fx.Node, Call] = {}
    for key, node in last.items():
        name, _, call = key.rpartition("@")
        found[node] = name, int(call)
    return found


class _Fed(fx.Interpreter):
    """Runs a program; every quantized tensor is compared, and replaced by the simulation's."""

    def __init__(
        self,
        program: Any,
        ends: Mapping[fx.Node, Call],
        grids: Mapping[str, Grid],
        codes: Mapping[Call, Tensor],
        totals: dict[Part, Total],
    ) -> None:
        super().__init__(program)
        self.ends, self.grids, self.codes, self.totals = ends, grids, codes, totals

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self.ends:
            return result
        call = self.ends[n]
        wanted, grid = self.codes[call], self.grids[call[0]]
        scale, zero_point = grid.shaped(result.shape)
        found = quantize(result, scale, zero_point, grid.spec)
        part = Part(n.name, (), call)
        self.totals.setdefault(part, Total()).add(wanted.numpy(), found.numpy(), True)
        return dequantize(wanted, scale, zero_point)
