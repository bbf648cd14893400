"""Study: mobile networks with real weights on real images. See README.md here.

    python -m experiments.imagenet_mobile.run --data FOLDER --mobilenet FILE --efficientnet FILE

FOLDER holds ``calibration`` and ``dev``, folders of images. Rows are appended to results.csv as
they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.data.imagefolder import ImageFolder
from dqss.lit.device import device_of
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.models.factory import timm_model
from dqss.search_spaces.studies import eight
from dqss.space import SearchSpace
from dqss.uniform import pair_name, uniform_assignments
from experiments.harness import (
    HeldOut,
    Quality,
    Table,
    add_accelerator,
    preset,
    quiet,
    study_parser,
    summarize,
)

HERE = Path(__file__).parent
NAMES = {"mobilenet": "mobilenetv2_100", "efficientnet": "tf_efficientnet_lite0"}
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8)}
COLUMNS = (
    "network", "bits", "seed", "steps", "row", "kl", "top1", "gain", "gain_low", "gain_high", "evaluations",
    "seconds",
    "name",
)  # fmt: skip


class Network:
    """A network with its calibration images and its held-out ones, which report only.

    Args:
        name: of :data:`NAMES`.
        checkpoint: its file.
        data: folder of images.
        device: where outputs on held-out images are made; None: where the network is, which stays there.
    """

    def __init__(self, name: str, checkpoint: Path, data: Path, device: torch.device | None = None) -> None:
        loaded = timm_model(NAMES[name], checkpoint=checkpoint, checkpoint_mapping="order")
        self.model: nn.Module = loaded.module
        images = ImageFolder(data / "calibration", data / "dev")
        images.configure(loaded.input, loaded.num_classes)
        self.samples = images.calibration()
        loader = images.val_dataloader()
        assert loader is not None
        batches: list[tuple[Tensor, Tensor]] = list(loader)
        pixels, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        # The files lie in class folders: in their own order the first few would be of a few classes.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        there = self.model if device is None else copy.deepcopy(self.model).to(device)
        self.held_out = HeldOut(there, pixels[order], labels[order], 25)


def diagonal(space: SearchSpace) -> dict[str, str]:
    """The uniform strategies with one algorithm for weights and inputs, by its name for weights.

    Percentiles are paired by their place in the lists: 99 for weights goes with 99.9 for inputs.
    """
    (rule,) = space.rules
    pairs = zip(rule.weight, rule.activation, strict=True)
    return {f"uniform {weight.method}": pair_name(weight, activation) for weight, activation in pairs}


Found = tuple[str, Quality, int, float, str]


def rows(
    network: Network, bits: tuple[int, int], settings: PTQSettings, seed: int, trainer: Mapping[str, Any]
) -> Iterator[Found]:
    """The search, its contenders, and what else one could have done."""
    space, held_out = eight(*bits), network.held_out
    started = time.perf_counter()
    result = search_ptq(network.model, network.samples, space, settings, seed=seed, trainer=trainer)
    seconds, evaluations = time.perf_counter() - started, result.metrics["evaluations"]
    outcome, supernet = result.discretized, result.supernet
    uniform = uniform_assignments(supernet)
    assert outcome.best_uniform is not None
    best = outcome.best_uniform
    yield "best_uniform", held_out.measure(supernet, uniform[best]), evaluations, seconds, best
    yield "float", held_out.float(), 0, 0.0, ""
    for row, name in (("argmax", "argmax"), ("refined", "refined"), ("exported", outcome.exported)):
        yield row, held_out.measure(supernet, outcome.assignments[name]), evaluations, seconds, name
    for row, name in diagonal(space).items():
        yield row, held_out.measure(supernet, uniform[name]), 0, 0.0, name


def main() -> None:
    """Compute the runs that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    add_accelerator(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--mobilenet", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--efficientnet", type=Path, help="efficientnet-lite0-57934424.pth")
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--method", default="ptq", choices=["ptq", "ptq_fast"], help="preset of the search")
    parser.add_argument("--steps", type=int, help="of four images each; by default as its preset says")
    arguments = parser.parse_args()
    if arguments.summary:
        shown = ("kl", "top1", "gain", "gain_low", "gain_high", "evaluations")
        return summarize(arguments.out, ("network", "bits", "steps", "row"), shown)
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=5)
    settings = preset(arguments.method)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps, batch_size=4)
    for name in NAMES:
        checkpoint = getattr(arguments, name)
        missing = [
            (bits, seed)
            for bits in arguments.bits
            for seed in arguments.seeds
            if not table.has(name, bits, seed, settings.steps_at(min(BITS[bits])), "uniform aciq_laplace")
        ]
        trainer = {"accelerator": arguments.accelerator}
        device = device_of(trainer)
        network = Network(name, checkpoint, arguments.data, device) if checkpoint and missing else None
        for bits, seed in missing if network else ():
            best: Quality | None = None
            steps = settings.steps_at(min(BITS[bits]))
            for row, found, evaluations, seconds, chosen in rows(
                network, BITS[bits], settings, seed, trainer
            ):
                best = best or found
                if not table.has(name, bits, seed, steps, row):
                    gain = found.gain_over(best)
                    key = (name, bits, seed, steps, row)
                    table.add(*key, found.kl, found.top1, *gain, evaluations, seconds, chosen)


if __name__ == "__main__":
    main()
