"""ModelOpt's auto_quantize at 6 effective bits of weights from {W4A8, W8A8}: see README.md here.

    python -m experiments.budgets.modelopt --data FOLDER --checkpoint FILE

It needs an environment of its own, with ``nvidia-modelopt`` beside dqss. Its calibration images are those
of the study, its gradients those of cross-entropy with their labels, which dqss does without. Rows are
appended to modelopt.csv; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness import Table, quiet
from experiments.imagenet_mobile.run import Network

HERE = Path(__file__).parent
COLUMNS = ("row", "kl", "top1", "mean_bits", "seconds", "note")
BATCH, EFFECTIVE_BITS = 16, 6.0


def formats(mtq: Any) -> list[dict[str, Any]]:
    """ModelOpt's own W8A8 (weights per channel, inputs per tensor, clipped at the largest), and at W4."""
    eight = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    four = copy.deepcopy(eight)
    for entry in four["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["num_bits"] = 4
    return [four, eight]


def auto_quantize(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[nn.Module, str]:
    """Its search by gradients; every layer is quantized (``allow_no_quant=False``)."""
    import modelopt.torch.quantization as mtq

    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    space = {"module_name_patterns": ["*"], "quantization_formats": formats(mtq), "allow_no_quant": False}
    found, state = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": EFFECTIVE_BITS},
        quantization_formats=formats(mtq),
        data_loader=batches,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
        module_search_spaces=[space],
    )
    return found, f"met: {state['best']['is_satisfied']}"


def quantize(model: nn.Module, images: Tensor, which: int) -> tuple[nn.Module, str]:
    """One of its formats for all layers, without a search."""
    import modelopt.torch.quantization as mtq

    def run(network: nn.Module) -> None:
        for batch in images.split(BATCH):
            network(batch)

    return mtq.quantize(copy.deepcopy(model), formats(mtq)[which], run), ""


def mean_bits(network: nn.Module) -> float:
    """Of the weights that are quantized, each value counted alike: what dqss limits."""
    widths = [
        (module.weight.numel(), module.weight_quantizer.num_bits)
        for module in network.modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    ]
    return sum(count * bits for count, bits in widths) / sum(count for count, _ in widths)


def fill(table: Table, network: Network) -> None:
    """The rows that are missing."""
    everything = range(len(network.samples))
    images, labels = network.samples.batch(everything), network.samples.targets(everything)
    if labels is None:
        raise SystemExit("error: ModelOpt's gradients need labels: put images in class folders")
    if not table.has("float"):
        table.add("float", 0.0, network.held_out.float().top1, 32.0, 0.0, "")
    tools: dict[str, Callable[[], tuple[nn.Module, str]]] = {
        "auto_quantize": lambda: auto_quantize(network.model, images, labels),
        "W4A8": lambda: quantize(network.model, images, 0),
        "W8A8": lambda: quantize(network.model, images, 1),
    }
    for name, tool in tools.items():
        if table.has(name):
            continue
        started = time.perf_counter()
        found, note = tool()
        seconds = time.perf_counter() - started
        judged = network.held_out.measure_module(found.eval())
        table.add(name, judged.kl, judged.top1, mean_bits(found), seconds, note)


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds calibration and dev")
    parser.add_argument("--checkpoint", type=Path, required=True, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "modelopt.csv")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    network = Network("mobilenet", arguments.checkpoint, arguments.data)
    fill(Table(arguments.out, COLUMNS, keys=1), network)


if __name__ == "__main__":
    main()
