"""Study: does an exported file give the simulation's answers? See README.md here.

    python -m experiments.export.run --data FOLDER --mobilenet FILE --efficientnet FILE
    python -m experiments.export.run --families 20
    python -m experiments.export.run --summary

FOLDER holds the data sets. Rows are appended to results.csv and families.csv as they are found;
rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss import __version__
from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.deploy.compared import Parity, Whole
from dqss.deploy.export import export_model
from dqss.deploy.report import ExportReport
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU, Target
from dqss.deploy.tolerance import Tolerance
from dqss.errors import UserError
from dqss.measure import batches
from dqss.metrics import task_metric
from dqss.prepare import prepare
from dqss.samples import Samples
from dqss.search_spaces import uniform
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Supernet
from experiments.export.networks import NETWORKS, Case, Files, families, family
from experiments.harness import Table, quiet

HERE = Path(__file__).parent
CANONICAL = GENERIC.in_form(exact=False)
TARGETS = {"generic": GENERIC, "canonical": CANONICAL, "onnxruntime-cpu": ONNXRUNTIME_CPU}
MIXED = tuple(range(2, 9))
BITS: dict[str, tuple[int | Sequence[int], int | Sequence[int]]] = {
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W4A4": (4, 4),
    "mixed": (MIXED, MIXED),
}
MEASURED = (
    "status", "inputs", "images", "quantized", "steps", "share", "off_part", "error", "noise", "control",
    "agreement", "control_agreement", "simulation", "onnxruntime", "integer", "products", "file",
    "estimate", "seconds", "arithmetic", "distance", "distance_agreement",
)  # fmt: skip
COLUMNS = ("network", "bits", "target", *MEASURED)
FAMILY_COLUMNS = ("model", "bits", "target", *MEASURED)
ANY = Tolerance(noise=float("inf"))
"""Parts are held to the default; how far the whole is off is what is asked here."""


def strategy(case: Case, bits: str, target: Target, seed: int = 0) -> Bundle:
    """Mean squared error for every tensor and product; of several bit-widths one is drawn for each."""
    space = target.adapt(uniform(*BITS[bits], ["mse"], ["mse"], products=True))
    prepared = prepare(case.model, case.calibration)
    supernet = Supernet(prepared.model, space)
    supernet.calibrate([case.calibration])
    generator = random.Random(seed)
    chosen = {name: generator.randrange(len(d.options)) for name, d in supernet.decisions.items()}
    info = ModelInfo(source="python", name=bits, weights_sha256="", tensors={}, prepare=[])
    fields: dict[str, Any] = {"dqss": __version__, "created": utc_now(), "search_space": "uniform"}
    fields |= {"method": "none", "seed": seed, "budget": None}
    return make_bundle(supernet, chosen, prepared, info, case.calibration, **fields)


@torch.no_grad()
def control(simulation: nn.Module, samples: Samples) -> Whole:
    """The simulation against itself, its sums in another order.

    One image at a time torch takes other kernels than for 25; where images come one at a time
    anyway, it is kept from its oneDNN kernels instead.
    """
    total, size = Whole(), 25 if samples.uniform else 1
    for run in batches(range(len(samples)), size):
        wanted = _first(simulation, samples.batch(run))
        if size > 1:
            found = torch.cat([_first(simulation, samples.batch([index])) for index in run])
        else:
            with torch.backends.mkldnn.flags(enabled=False):
                found = _first(simulation, samples.batch(run))
        total.add(len(run), wanted, wanted, found)
    return total


def _first(model: nn.Module, batch: Any) -> Tensor:
    return first_tensor(call_model(model, batch))


def row(case: Case, bundle: Bundle, target: Target, checked: Whole | None) -> list[object]:
    """Export, and what came of it."""
    started = time.perf_counter()
    seen: list[Parity] = []
    metric = task_metric("classification", None)[1] if case.samples.labelled else None
    quantized = sum(1 for _ in bundle.strategy.choices())
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = export_model(
                case.model,
                bundle,
                Path(folder, "model.onnx"),
                case.samples,
                target=target,
                tolerance=ANY,
                metric=metric,
                watch=seen.append,
            )
    except UserError as error:
        blank = [""] * (len(MEASURED) - 8)
        return [
            f"{type(error).__name__}: {error}",
            len(case.samples),
            case.images,
            quantized,
            *blank,
            _since(started),
            *[""] * 3,
        ]
    found = [*_parity(report, checked), *_kernels(report), report.sizes.file / report.sizes.floating]
    estimate = report.sizes.estimate / report.sizes.floating
    last = [estimate, _since(started), *_distance(report.parity)]
    return ["pass", len(case.samples), case.images, quantized, *found, *last]


def _since(started: float) -> float:
    return time.perf_counter() - started


def _parity(report: ExportReport, checked: Whole | None) -> Iterator[object]:
    parity, whole = report.parity, report.parity.whole
    integer = [part for part in parity.parts if part.part.call is not None]
    worst = parity.worst()
    yield f"{max((part.largest for part in integer), default=0):.0f}"
    yield f"{worst.share:.5f}"
    yield worst.part
    yield f"{whole.relative_error:.2g}"
    yield f"{whole.noise:.2g}"
    yield "" if checked is None else f"{checked.relative_error:.2g}"
    yield "" if whole.agreement is None else whole.agreement
    yield "" if checked is None or checked.agreement is None else checked.agreement
    yield report.metric.get("simulation", "")
    yield report.metric.get("onnxruntime", "")


def _distance(parity: Parity) -> Iterator[object]:
    """Which simulation was compared, and how far it is from the fake-quantized one."""
    distance = parity.distance
    yield parity.arithmetic
    yield "" if distance is None else f"{distance.relative_error:.2g}"
    yield "" if distance is None or distance.agreement is None else distance.agreement


def _kernels(report: ExportReport) -> tuple[int, int]:
    integer = report.kernels.integer.total()
    return integer, integer + report.kernels.floating.total()


def networks(
    files: Files,
    names: Sequence[str],
    wanted: Sequence[str],
    targets: Sequence[str],
    limit: int | None,
    out: Path,
) -> None:
    """The networks of the question, at every width and for every target that has it.

    At most ``limit`` inputs are compared, drawn at random: files lie in the order of their classes.
    """
    table = Table(out, COLUMNS, keys=3)
    for name in names:
        missing = [
            (bits, label)
            for bits in wanted
            for label in targets
            if (label != ONNXRUNTIME_CPU.name or bits in ("W8A8", "W4A8"))
            and not table.has(name, bits, label)
        ]
        case = NETWORKS[name](files) if missing else None
        for bits, label in missing:
            assert case is not None
            case.samples, target = drawn(case.samples, limit), TARGETS[label]
            bundle = strategy(case, bits, target)
            arithmetic = target.arithmetic_of(bundle.strategy)
            simulation = apply_strategy(case.model, bundle, arithmetic=arithmetic)
            checked = control(simulation, case.samples)
            table.add(name, bits, label, *row(case, bundle, target, checked))


def drawn(samples: Samples, limit: int | None) -> Samples:
    """At most ``limit`` of them, at random."""
    if limit is None or len(samples) <= limit:
        return samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return samples.subset(order[:limit].tolist())


def timm_families(count: int, bits: str, label: str, out: Path) -> None:
    """The first ``count`` families of timm that there is no row of yet."""
    table = Table(out, FAMILY_COLUMNS, keys=3)
    missing = [entry for entry in families() if not table.has(entry.model, bits, label)]
    for entry in missing[:count]:
        try:
            case, target = family(entry), TARGETS[label]
            found = row(case, strategy(case, bits, target), target, None)
        except Exception as error:
            words = " ".join(str(error).split())[:160]
            found = [f"crashed: {type(error).__name__}: {words}", *[""] * (len(MEASURED) - 1)]
        table.add(entry.model, bits, label, *found)


def summary(path: Path) -> None:
    """The table of README.md."""
    shown = [c for c in COLUMNS if c not in ("images", "off_part", "seconds")]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    print("|", " | ".join(shown), "|")
    print("|---" * len(shown) + "|")
    for entry in rows:
        print("|", " | ".join(entry.get(c) or entry.get("model", "") for c in shown), "|")


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--mobilenet", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--efficientnet", type=Path, help="efficientnet-lite0-57934424.pth")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--images", type=int, help="compare on so many at most")
    parser.add_argument("--families", type=int, default=0, help="so many more of timm's, at W8A8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="print the rows that are there")
    arguments = parser.parse_args()
    if arguments.summary:
        return summary(HERE / "results.csv")
    quiet(arguments.threads)
    if arguments.families:
        for label in arguments.targets:
            timm_families(arguments.families, "W8A8", label, HERE / "families.csv")
        return None
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    files = Files(arguments.data, arguments.mobilenet, arguments.efficientnet)
    out = HERE / "results.csv"
    networks(files, arguments.networks, arguments.bits, arguments.targets, arguments.images, out)


if __name__ == "__main__":
    main()
