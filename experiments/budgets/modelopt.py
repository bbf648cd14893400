"""ModelOpt's auto_quantize at 6 effective bits of weights from {W4A8, W8A8}: see README.md here.

    python -m experiments.budgets.modelopt --data FOLDER --checkpoint FILE

It needs an environment of its own, with ``nvidia-modelopt`` beside dqss. Its calibration images are those
of the study, its gradients those of cross-entropy with their labels, which dqss does without. Rows are
appended to modelopt.csv; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from experiments.harness import Table, quiet
from experiments.imagenet_mobile.run import Network
from experiments.modelopt import Format, auto_quantize, labelled, quantize, w8a8

HERE = Path(__file__).parent
COLUMNS = ("row", "kl", "top1", "mean_bits", "seconds", "note")
EFFECTIVE_BITS = 6.0


def four_bits() -> Format:
    """ModelOpt's own W8A8 with weights of four bits."""
    found = w8a8()
    for entry in found["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["num_bits"] = 4
    return found


def searched(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[nn.Module, str]:
    """Its choice between the two for each layer."""
    found, best = auto_quantize(model, images, labels, [four_bits(), w8a8()], EFFECTIVE_BITS)
    return found, f"met: {best['is_satisfied']}"


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
    images, labels = labelled(network.samples)
    if not table.has("float"):
        table.add("float", 0.0, network.held_out.float().top1, 32.0, 0.0, "")
    tools: dict[str, Callable[[], tuple[nn.Module, str]]] = {
        "auto_quantize": lambda: searched(network.model, images, labels),
        "W4A8": lambda: (quantize(network.model, images, four_bits()), ""),
        "W8A8": lambda: (quantize(network.model, images, w8a8()), ""),
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
