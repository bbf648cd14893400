"""ModelOpt's auto_quantize beside a search of dqss: same network, images and process. See README.md here.

    python -m experiments.benchmarks.modelopt --data FOLDER --mobilenet FILE

It needs an environment of its own, with ``nvidia-modelopt`` beside dqss. Rows are appended to
modelopt.csv; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.samples import Samples
from dqss.search_spaces.studies import eight
from experiments.benchmarks.timing import clock, timed
from experiments.harness import CPU, Table, quiet
from experiments.imagenet_mobile.run import Network
from experiments.modelopt import BATCH, Format, auto_quantize, labelled, quantize, w8a8

HERE = Path(__file__).parent
COLUMNS = ("row", "images", "passes", "passes_low", "passes_high", "kl", "top1", "seconds", "note")
PASSES = 3
"""Float passes before and after what they are the unit of."""

Found = tuple[nn.Module, str]
Tool = Callable[[], Found]


def formats() -> list[Format]:
    """W8A8 by ModelOpt's own recipe, clipped at the largest value and where the squared error is least."""
    return [w8a8(), {**w8a8(), "algorithm": {"method": "mse"}}]


def chosen_by_modelopt(model: nn.Module, images: Tensor, labels: Tensor) -> Found:
    """ModelOpt's choice between the two for each layer."""
    found, best = auto_quantize(model, images, labels, formats(), 8.0)
    chosen = [str(recipe) for recipe in best["recipe"].values()]
    counts = {name: chosen.count(name) for name in sorted(set(chosen))}
    return found, "; ".join(f"{name}: {count}" for name, count in counts.items())


def searched(model: nn.Module, samples: Samples, settings: PTQSettings) -> Found:
    """The search of dqss with the eight candidates a side of the studies."""
    result = search_ptq(model, samples, eight(8, 8), settings, trainer=CPU)
    note = f"exported: {result.discretized.exported}; counted: {result.metrics['evaluations']}"
    return result.quantized(), note


def float_pass(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """The unit of time."""

    @torch.no_grad()
    def run() -> None:
        for batch in images.split(2 * BATCH):
            model(batch)

    return run


def fill(table: Table, network: Network, settings: PTQSettings) -> None:
    """The rows that are missing, each between float passes of its own."""
    images, labels = labelled(network.samples)
    model, device = network.model, torch.device("cpu")
    run = float_pass(model, images)
    tools: dict[str, Tool] = {
        "modelopt auto_quantize": lambda: chosen_by_modelopt(model, images, labels),
        "modelopt max": lambda: (quantize(model, images, formats()[0]), ""),
        "modelopt mse": lambda: (quantize(model, images, formats()[1]), ""),
        f"dqss, {settings.steps_at(8)} steps": lambda: searched(model, network.samples, settings),
    }
    if not table.has("float", len(images)):
        judged = network.held_out.float()
        table.add("float", len(images), 1.0, 1.0, 1.0, judged.kl, judged.top1, timed(run, device), "")
    for name, tool in tools.items():
        if table.has(name, len(images)):
            continue
        if name.startswith("dqss"):
            warm_up(model, network.samples)
        units = [timed(run, device) for _ in range(PASSES)]
        now = clock(device)
        started = now()
        found, note = tool()
        seconds = now() - started
        units += [timed(run, device) for _ in range(PASSES)]
        judged = network.held_out.measure_module(found.eval())
        table.add(name, len(images), *in_units(seconds, units), judged.kl, judged.top1, seconds, note)


def in_units(seconds: float, units: Sequence[float]) -> tuple[float, float, float]:
    """In float passes: by their median, and by the slowest and the fastest of them."""
    return seconds / median(units), seconds / max(units), seconds / min(units)


def warm_up(model: nn.Module, samples: Samples) -> None:
    """Compile the mixtures, which is kept from one process to the next."""
    short = PTQSettings(steps=2, refine=RefineSettings(passes=1), finalists=1)
    search_ptq(model, samples.subset(range(40)), eight(8, 8), short, trainer=CPU)


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds calibration and dev")
    parser.add_argument("--mobilenet", type=Path, required=True, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--steps", type=int, default=PTQSettings().steps_at(8), help="of the search of dqss")
    parser.add_argument("--images", type=int, help="of the calibration set (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "modelopt.csv")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    network = Network("mobilenet", arguments.mobilenet, arguments.data)
    if arguments.images:
        network.samples = network.samples.subset(range(arguments.images))
    fill(Table(arguments.out, COLUMNS, keys=2), network, PTQSettings(steps=arguments.steps))


if __name__ == "__main__":
    main()
