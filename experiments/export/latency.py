"""Study: is an exported file as fast as ONNX Runtime's own static quantization, and in exact sums? README.md.

    python -m experiments.export.latency --data FOLDER --mobilenet FILE --rounds 200
    python -m experiments.export.latency --data FOLDER --network vit_tiny --variants "dqss exact" ...

Float, ONNX Runtime's static quantization (per channel, min-max, QDQ) and exported files of the
same MobileNetV2, one image, one thread, interleaved: each round runs every variant once, in another
order. Ratios are medians of per-round ratios. Accuracy is on the same images, through ONNX Runtime.
Run it on a quiet machine: on a busy one a round is torn apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from dqss.deploy.export import export_model
from dqss.deploy.runtime import kernels_of, open_session
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU
from dqss.prepare import prepare
from experiments.export.networks import NETWORKS, Case, Files
from experiments.export.run import ANY, CANONICAL, strategy
from experiments.harness import Table, quiet

HERE = Path(__file__).parent
DQSS = {
    "dqss": ("W8A8", ONNXRUNTIME_CPU),
    "dqss exact": ("W8A8", GENERIC),
    "dqss canonical": ("W8A8", CANONICAL),
    "dqss W4A4 exact": ("W4A4", GENERIC),
    "dqss W4A4 canonical": ("W4A4", CANONICAL),
}
"""Files for onnxruntime-cpu, and for generic in both forms."""
STATIC = "onnxruntime static"
COLUMNS = (
    "network", "variant", "median_ms", "ratio_to_float", "ratio_to_static", "top1", "images", "rounds",
    "kernels", "load",
)  # fmt: skip


class _Reader(CalibrationDataReader):
    def __init__(self, images: torch.Tensor) -> None:
        self.batches: Iterator[torch.Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch.numpy()}


def float_file(model: nn.Module, batch: torch.Tensor, path: Path) -> Path:
    """The float network as ONNX, batch norms folded as in every other variant."""
    prepared = prepare(model, batch).model
    torch.onnx.export(
        prepared,
        (batch[:2],),
        str(path),
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=21,
        external_data=False,
        verbose=False,
    )
    return path


def own_static(source: Path, images: torch.Tensor, method: CalibrationMethod, folder: Path) -> Path:
    """ONNX Runtime's static quantization, as its documentation recommends it for a CPU with VNNI."""
    ready, path = folder / "ready.onnx", folder / f"{method.name}.onnx"
    quant_pre_process(str(source), str(ready))
    quantize_static(
        str(ready),
        str(path),
        _Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
    )
    return path


def variants(case: Case, wanted: Sequence[str], folder: Path) -> dict[str, bytes]:
    """The float file and the wanted ones, by name."""
    paths = {"float": float_file(case.model, case.calibration, folder / "float.onnx")}
    if STATIC in wanted:
        paths[STATIC] = own_static(paths["float"], case.calibration, CalibrationMethod.MinMax, folder)
    few = case.samples.subset(range(8))
    for name, (bits, target) in ((name, DQSS[name]) for name in DQSS if name in wanted):
        paths[name] = folder / f"{name}.onnx"
        export_model(case.model, strategy(case, bits, target), paths[name], few, target=target, tolerance=ANY)
    return {name: path.read_bytes() for name, path in paths.items()}


def top1(data: bytes, case: Case) -> float | str:
    """Share of right answers on all images; empty where nobody knows them."""
    if not case.samples.labelled:
        return ""
    session, right = open_session(data), 0
    for index in range(len(case.samples)):
        targets = case.samples.targets([index])
        assert targets is not None
        (output,) = session.run(None, {"input": case.samples.batch([index]).numpy()})
        right += int(output.argmax() == int(targets))
    return right / len(case.samples)


def times(files: dict[str, bytes], image: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by variant."""
    sessions = {name: open_session(data) for name, data in files.items()}
    found: dict[str, list[float]] = {name: [] for name in files}
    order, generator = list(files), random.Random(0)
    for number in range(rounds + 10):
        generator.shuffle(order)
        for name in order:
            started = time.perf_counter()
            sessions[name].run(None, {"input": image})
            if number >= 10:
                found[name].append(time.perf_counter() - started)
    return found


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path)
    parser.add_argument("--network", default="mobilenetv2", choices=["mobilenetv2", "vit_tiny"])
    parser.add_argument("--variants", nargs="+", default=[STATIC, *DQSS], choices=[STATIC, *DQSS])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--load", default="quiet", help="what to write down about the machine")
    parser.add_argument("--out", type=Path, default=HERE / "latency.csv")
    arguments = parser.parse_args()
    quiet(1)
    table = Table(arguments.out, COLUMNS, keys=2)
    case = NETWORKS[arguments.network](Files(arguments.data, arguments.mobilenet, None))
    with tempfile.TemporaryDirectory() as folder:
        files = variants(case, arguments.variants, Path(folder))
    measured = times(files, case.samples.batch([0]).numpy(), arguments.rounds)
    for name, data in files.items():
        ratios = (
            statistics.median(a / b for a, b in zip(measured[name], measured[base], strict=True))
            if base in measured
            else ""
            for base in ("float", STATIC)
        )
        row = (statistics.median(measured[name]) * 1e3, *ratios, top1(data, case))
        table.add(
            arguments.network,
            name,
            *row,
            len(case.samples),
            arguments.rounds,
            kernels_of(data),
            arguments.load,
        )


if __name__ == "__main__":
    main()
