"""Study: post-training quantization of the published RLFN, which enlarges pictures. See README.md here.

    python -m experiments.sr_rlfn.run --data FOLDER

FOLDER holds ``weights/rlfn_x4.pth``, ``Set5``, ``Set14`` and ``BSDS_train``. Rows are appended to
results.csv as they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.apply import apply_strategy, make_bundle
from dqss.budget import Budget
from dqss.bundle import Bundle
from dqss.data.pictures import Pictures
from dqss.image_quality import psnr_y
from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import PictureLoss
from dqss.measure import home
from dqss.models.super_resolution import super_resolution
from dqss.prepare import Prepared
from dqss.progress import Reporter
from dqss.repair import RepairSettings, repair_strategy
from dqss.samples import Samples, split
from dqss.search_spaces import uniform
from dqss.search_spaces.studies import EIGHT_WEIGHTS, PICTURES_ACTIVATIONS
from dqss.space import SearchSpace
from dqss.supernet import Assignment, Supernet
from dqss.uniform import uniform_assignments
from experiments.harness import CPU, Table, add_accelerator, quiet, study_parser, summarize
from experiments.widths import same_mean

HERE = Path(__file__).parent
COLUMNS = ("bits", "edges", "seed", "row", "set5", "set14", "mse", "evaluations", "seconds", "name")
SCALE, PATCHES, PATCH = 4, 32, 32
FIELDS = ("dqss", "created", "search_space", "method", "seed", "budget")
EDGES = ("conv_1", "upsampler.0")
"""The first and the last layer."""
SETS = ("Set5", "Set14")
LAYERS = RepairSettings(blocks=(), drop=0.0, float_inputs=0.0, iterations=1000, batch_size=8)
SHORT = replace(LAYERS, iterations=200, batch_size=4)
NETWORK = replace(SHORT, iterations=0, network_iterations=300)
REPAIRS = {
    "layers": SHORT,
    "network": NETWORK,
    "adaround": LAYERS,
    "adaround+steps": replace(LAYERS, learn_steps=True),
    "blocks+steps": RepairSettings(iterations=1000, batch_size=8, learn_steps=True),
    "blocks+steps+biases": RepairSettings(
        iterations=1000, batch_size=8, learn_steps=True, bias_correction=True
    ),
}
"""What is learned around the searched and the best uniform strategy: rounding by layers or by blocks, or all
of the network at once."""


def space(bits: int, edges: int, more: bool = False) -> SearchSpace:
    """Nine ways to clip inputs, eight to clip weights; the first and the last layer at ``edges`` bits.

    With ``more`` one more of each: weights whose rounding is fitted, clip ranges by curvature for inputs.
    """
    return uniform(
        bits,
        bits,
        [*EIGHT_WEIGHTS, *["adaround"] * more],
        [*PICTURES_ACTIVATIONS, *["hessian"] * more],
        edges=EDGES,
        edge_bits=edges,
        name=f"sr_rlfn({bits}, {edges}{', more' if more else ''})",
    )


@dataclass(frozen=True)
class Moving:
    """Bits that a search may choose; none: from two fewer to two more than the others have.

    ``extra`` of them, in the mean, are allowed beyond those of uniform strategies.
    """

    widths: tuple[int, ...] = ()
    extra: float = 0.0

    def __str__(self) -> str:
        return "-".join(map(str, ("widths", *self.widths))) + f"+{self.extra:g}" * bool(self.extra)

    def space(self, bits: int, edges: int) -> SearchSpace:
        """What is best at one width, at several; edges too where they have as many bits as the others."""
        several = self.widths or range(bits - 2, bits + 3)
        fixed = EDGES if edges != bits else ()
        name = f"{self}({bits}, {edges})"
        return uniform(
            several, several, ["adaround"], ["hessian", "mse"], edges=fixed, edge_bits=edges, name=name
        )

    def budget(self, model: nn.Module, example: Tensor, bits: int, edges: int) -> Budget:
        """What uniform strategies spend, and no more than ``extra``."""
        found = same_mean(model, example, (bits, bits), EDGES, edges)
        more = {name: value + self.extra for name, value in found.given().items()}
        return replace(found, **more)  # type: ignore[arg-type]


class Study:
    """The network, and whole pictures to measure on: nothing is chosen with them."""

    def __init__(
        self,
        data: Path,
        settings: PTQSettings,
        trainer: Mapping[str, Any] = CPU,
        patch: int = PATCH,
        more: bool = False,
        moving: Moving | None = None,
    ) -> None:
        self.data, self.settings, self.trainer = data, settings, trainer
        self.patch, self.more, self.moving = patch, more, moving
        loaded = super_resolution("rlfn", SCALE, data / "weights" / "rlfn_x4.pth")
        self.model: nn.Module = loaded.module
        self.input = loaded.input
        self.sets = {name: self._pictures(data / name) for name in SETS}

    def _pictures(self, folder: Path) -> list[tuple[Tensor, Tensor]]:
        data = Pictures(self.data / "BSDS_train", folder)
        data.configure(self.input)
        loader = data.val_dataloader()
        assert loader is not None
        return list(loader)

    @torch.no_grad()
    def psnr(self, network: nn.Module, name: str) -> float:
        """Mean over the pictures of a set, in dB."""
        device = home(network)
        pictures = ((network(low.to(device)).cpu(), high) for low, high in self.sets[name])
        return float(
            torch.cat([psnr_y(made, high, peak=255.0, border=SCALE) for made, high in pictures]).mean()
        )

    def both(self, supernet: Supernet, assignment: Assignment) -> tuple[float, float]:
        """On both sets."""
        with supernet.assign(assignment):
            return self.psnr(supernet, "Set5"), self.psnr(supernet, "Set14")

    def patches(self, seed: int, patch: int | None = None) -> Samples:
        """Another choice for each seed; ``patch`` pixels a side, by default those of the study."""
        data = Pictures(self.data / "BSDS_train", None, PATCHES, patch or self.patch, seed)
        data.configure(self.input)
        return data.calibration()

    def rows(
        self, bits: int, edges: int, seed: int, loss: str, repairs: Sequence[str]
    ) -> Iterator[tuple[object, ...]]:
        """The search with all that it is compared with, and what repair adds to it."""
        patches = self.patches(seed)
        started = time.perf_counter()
        # L1 to the pictures themselves, or the squared error to the float network's output.
        settings = replace(self.settings, loss=PictureLoss() if loss == "picture" else None)
        given, budget = self.allowed(bits, edges, patches)
        result = search_ptq(
            self.model, patches, given, settings, seed=seed, trainer=self.trainer, budget=budget
        )
        seconds, supernet = time.perf_counter() - started, result.supernet
        found, metrics = result.discretized, result.metrics
        suffix = suffix_of(loss, settings.smooth, self.patch, self.more, self.moving)
        spent = metrics["evaluations"]
        assignments = found.assignments
        both = self.both(supernet, assignments["refined"])
        yield "searched" + suffix, *both, found.selection["refined"], spent, seconds, found.exported
        learned = patches.subset(split(len(patches), settings.parts, seed)[0])
        for name in repairs:
            bundle = bundle_of(result, assignments["refined"])
            yield f"searched{suffix}+{name}", *self.repaired(bundle, learned, name, seed)
        if loss != "output" or self.moving is not None:  # the uniform ones are those of the other spaces
            return
        uniform_name = found.best_uniform
        assert uniform_name is not None
        both = self.both(supernet, assignments[uniform_name])
        yield "best_uniform" + suffix, *both, found.selection[uniform_name], 0, 0.0, uniform_name
        for name in repairs:
            bundle = bundle_of(result, assignments[uniform_name])
            yield f"best_uniform{suffix}+{name}", *self.repaired(bundle, learned, name, seed)

    def allowed(self, bits: int, edges: int, patches: Samples) -> tuple[SearchSpace, Budget | None]:
        """Candidates, and what they may cost together where bits move."""
        if self.moving is None:
            return space(bits, edges, self.more), None
        budget = self.moving.budget(self.model, patches.batch([0]), bits, edges)
        return self.moving.space(bits, edges), budget

    def repaired(self, bundle: Bundle, patches: Samples, name: str, seed: int) -> tuple[object, ...]:
        """A strategy after learned rounding, on the patches that were searched on."""
        device, started = device_of(self.trainer), time.perf_counter()
        tuned = repair_strategy(self.model, bundle, patches, REPAIRS[name], seed=seed, device=device).bundle
        seconds = time.perf_counter() - started
        network = apply_strategy(self.model, tuned).to(device)
        return self.psnr(network, "Set5"), self.psnr(network, "Set14"), "nan", 0, seconds, name

    def uniform_rows(self, bits: int, edges: int, seed: int, every: bool) -> Iterator[tuple[object, ...]]:
        """All uniform pairs, or those of one algorithm on both sides, on Set5."""
        device, patches = device_of(self.trainer), self.patches(seed)
        candidates = space(bits, edges, self.more)
        found = build(self.model, patches, candidates, self.settings, seed, None, device, Reporter())
        supernet = found[1].supernet
        for name, assignment in uniform_assignments(supernet).items():
            if every or alike(name):
                with supernet.assign(assignment):
                    yield f"uniform {name}", self.psnr(supernet, "Set5"), "nan", "nan", 0, 0.0, name


def bundle_of(result: SearchResult, assignment: Assignment) -> Bundle:
    """Another strategy of a search than the one that it exports."""
    info = result.bundle.strategy.model
    prepared = Prepared(result.model, info.prepare, info.tensors, info.weights_sha256, [])
    fields = {name: getattr(result.bundle.strategy, name) for name in FIELDS}
    first = torch.zeros(1, 3, PATCH, PATCH)
    return make_bundle(result.supernet, assignment, prepared, info, first, **fields)


def suffix_of(loss: str, smooth: bool, patch: int, more: bool, moving: Moving | None = None) -> str:
    """Of a row's name: what is not as in the main table."""
    parts = (
        [loss] * (loss != "output")
        + ["smoothed"] * smooth
        + [f"{patch}px"] * (patch != PATCH)
        + ["more"] * more
        + [str(moving)] * (moving is not None)
    )
    return "".join(f"_{part}" for part in parts)


def alike(name: str) -> bool:
    """Whether a pair is of one algorithm on both sides, whatever its parameter."""
    weight, activation = (part.split(" ")[1].split("@")[0].split("(")[0] for part in name.split(" / "))
    return weight == activation


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    add_accelerator(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--edges", type=int, default=8, help="bits of the first and the last layer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--loss", choices=["output", "picture"], default="output")
    parser.add_argument("--patch", type=int, default=PATCH, help="pixels a side of a patch")
    parser.add_argument("--more", action="store_true", help="adaround and hessian are candidates too")
    moves = "bits move too, by two or among these, as many in the mean"
    parser.add_argument("--widths", type=int, nargs="*", metavar="BITS", help=moves)
    parser.add_argument("--extra", type=float, default=0.0, help="bits more in the mean, with --widths")
    parser.add_argument("--smooth", action="store_true", help="first smooth ranges of channels")
    parser.add_argument("--repair", nargs="*", default=[], choices=REPAIRS, help="rounding that is learned")
    parser.add_argument("--uniform", choices=["alike", "all"], help="measure uniform pairs, and nothing else")
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, ("bits", "edges", "row"), ("set5", "set14", "mse", "seconds"))
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=4)
    settings = PTQSettings(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        screen_images=4,
        discrete_every=0,
        smooth=arguments.smooth,
    )
    trainer = {"accelerator": arguments.accelerator}
    moving = None if arguments.widths is None else Moving(tuple(arguments.widths), arguments.extra)
    study = Study(arguments.data, settings, trainer, arguments.patch, arguments.more, moving)
    for row in () if table.has("float", "", "", "float") else ("float",):
        both = study.psnr(study.model, "Set5"), study.psnr(study.model, "Set14")
        table.add("float", "", "", row, *both, 0.0, 0, 0.0, "")
    given = (arguments.loss, arguments.smooth, arguments.patch, arguments.more, moving)
    searched = "searched" + suffix_of(*given)
    both = arguments.loss == "output" and moving is None
    around = [searched, *[searched.replace("searched", "best_uniform")] * both]
    wanted = [searched, *(f"{row}+{name}" for row in around for name in arguments.repair)]
    for key in product(arguments.bits, [arguments.edges], arguments.seeds):
        if arguments.uniform is not None:
            found = study.uniform_rows(*key, arguments.uniform == "all")
        elif not all(table.has(*key, row) for row in wanted):
            found = study.rows(*key, arguments.loss, arguments.repair)
        else:
            continue
        for row in found:
            if not table.has(*key, row[0]):
                table.add(*key, *row)


if __name__ == "__main__":
    main()
