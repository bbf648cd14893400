"""A strategy as a file for another runtime, with the proof that it gives the same answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dqss.bundle import Bundle
from dqss.deploy.targets import GENERIC, Target
from dqss.deploy.tolerance import DEFAULT, Tolerance
from dqss.errors import ExportError
from dqss.io import StrPath
from dqss.progress import Reporter
from dqss.samples import Samples

if TYPE_CHECKING:
    from dqss.deploy.compared import Parity
    from dqss.deploy.report import ExportReport

_NEEDED = ("ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "onnxscript")


def export_model(
    model: nn.Module,
    bundle: Bundle,
    path: StrPath,
    inputs: Samples | Tensor | Iterable[Any],
    *,
    target: Target = GENERIC,
    exact: bool | None = None,
    dynamic_size: bool | None = None,
    tolerance: Tolerance = DEFAULT,
    part_inputs: int = 32,
    metric: Callable[[], Any] | None = None,
    watch: Callable[[Parity], None] | None = None,
    threads: int = 1,
    force: bool = False,
    reporter: Reporter | None = None,
) -> ExportReport:
    """Write the quantized network as ONNX (opset 21), after comparing it with the simulation.

    The comparison runs in ONNX Runtime, on the network as a whole and on every part of it fed the
    simulation's own integers. A file that fails it is not written; the old one stays.

    Args:
        model: the trained float network, as it was given to the search; fp32.
        bundle: from :func:`dqss.load` or a search.
        path: of the file; its folder is made if need be.
        inputs: real ones, as the search takes them: a tensor ``[N, ...]``, or an iterable of batches.
        target: the runtime that the file is for; see :mod:`dqss.deploy.targets`.
        exact: compute layers on codes, so that every runtime gives the simulation's very bits; by default
            where the target has no integer kernels. False for the pattern that converters look for.
        dynamic_size: leave height and width of images open; by default where images come out.
        tolerance: how far the file may be off.
        part_inputs: the parts are compared on so many of the inputs.
        metric: makes a task metric, for ``inputs`` with targets.
        watch: is shown the comparison before it is judged.
        threads: of ONNX Runtime.
        force: apply the strategy also to other weights.
        reporter: progress; silent by default.

    Returns:
        What was written and measured.

    Raises:
        TargetError: where the target cannot run the strategy.
        ExportError: where the network cannot be traced, or a package is missing.
        ParityError: where the file gives other answers; it names the first part that differs.
        StrategyError: for another model.
        OutputError: where the file cannot be written.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"an export needs {', '.join(missing)}: pip install 'dqss[onnx]'")
    target = target.in_form(exact)
    target.check_strategy(bundle.strategy)
    from dqss.deploy.pipeline import export
    from dqss.deploy.work import Options

    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    shown = reporter or Reporter()
    options = Options(target, dynamic_size, tolerance, part_inputs, metric, watch, threads, force, shown)
    return export(model, bundle, Path(path), samples, options)
