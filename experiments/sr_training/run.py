"""Study: networks that enlarge pictures, trained from nothing for some minutes. See README.md here.

    python -m experiments.sr_training.run --data FOLDER --work WORK

FOLDER holds ``BSDS_train``, ``Set5`` and ``Set14``; WORK takes checkpoints, from which an interrupted
training goes on. Rows are appended to results.csv, several for each training: its course.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dqss.data.bicubic import resize
from dqss.data.pictures import Pictures
from dqss.image_quality import psnr_y
from dqss.lit.recipe import TrainingRun
from dqss.lit.super_resolution import SuperResolutionTraining
from dqss.lit.super_resolution_recipe import SuperResolutionRecipe
from dqss.models.super_resolution import super_resolution
from dqss.progress import Reporter
from experiments.harness import CPU, Table, quiet, study_parser

HERE = Path(__file__).parent
COLUMNS = ("network", "training", "seed", "step", "set5", "set14", "loss", "seconds")
SCALE, PATCH, BATCH = 2, 24, 4
SETS = {"Set5": Path("Set5"), "Set14": Path("Set14/x4/HR")}
"""Of the second one only the pictures are there; low resolution is made on the fly."""


@dataclass(frozen=True)
class Training:
    """A row: which network, in how many stages of equal length, with how much of the contrastive loss."""

    network: str
    stages: int = 1
    contrastive: float = 0.0

    @property
    def word(self) -> str:
        """What is not plain L1 in one stage."""
        parts = ["l1"] + ["warm_start"] * (self.stages > 1) + ["contrastive"] * (self.contrastive > 0)
        return "+".join(parts)


TRAININGS = (
    Training("rlfn_s"),
    Training("rlfn_s", stages=2),
    Training("rlfn_s", contrastive=0.1),
    Training("ditn_tiny"),
    Training("rlfn_s", stages=2, contrastive=0.1),
)


class Bicubic(nn.Module):
    """What a network should beat."""

    def forward(self, low: Tensor) -> Tensor:
        """``[N, 3, h, w]`` to twice the sides."""
        return resize(low, SCALE * low.shape[2], SCALE * low.shape[3])


class Held:
    """Whole pictures to measure on: nothing is trained or chosen with them."""

    def __init__(self, data: Path, peak_of: Pictures) -> None:
        self.peak, self.sets = peak_of.peak, []
        for folder in SETS.values():
            found = Pictures(data / "BSDS_train", data / folder)
            assert peak_of.input is not None
            found.configure(peak_of.input)
            loader = found.val_dataloader()
            assert loader is not None
            self.sets.append(list(loader))

    @torch.no_grad()
    def psnr(self, network: nn.Module) -> list[float]:
        """Mean of each set in dB, on luma, border of two pixels cut off."""
        return [
            float(
                torch.cat(
                    [psnr_y(network(low), high, peak=self.peak, border=SCALE) for low, high in pairs]
                ).mean()
            )
            for pairs in self.sets
        ]


class Course(pl.Callback):
    """Writes a row of the table whenever the training has written one of its history."""

    def __init__(self, table: Table, key: tuple[object, ...], held: Held) -> None:
        self.table, self.key, self.held = table, key, held
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """The averaged network on both sets."""
        assert isinstance(module, SuperResolutionTraining)
        row = module.history[-1] if module.history else {"step": -1}
        if row["step"] == module.global_step and not self.table.has(*self.key, int(row["step"])):
            seconds = time.perf_counter() - self.started
            psnr = self.held.psnr(module.average.eval())
            self.table.add(*self.key, int(row["step"]), *psnr, float(row["loss"]), seconds)


def main() -> None:
    """Train what is missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=600, help="steps between two measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=4)
    for seed, training in product(arguments.seeds, TRAININGS):
        torch.manual_seed(seed)
        loaded = super_resolution(training.network, SCALE)
        data = Pictures(arguments.data / "BSDS_train", None, patch=PATCH, seed=seed)
        data.configure(loaded.input)
        held, key = Held(arguments.data, data), (training.network, training.word, seed)
        if not table.has("bicubic", "", "", ""):
            table.add("bicubic", "", "", "", *held.psnr(Bicubic()), "", "")
        if table.has(*key, arguments.steps):
            continue
        recipe = SuperResolutionRecipe(
            stages=[arguments.steps // training.stages] * training.stages,
            contrastive=training.contrastive,
            batch_size=BATCH,
            measure_every=arguments.every,
        )
        course = Course(table, key, held)
        folder = arguments.work / "_".join(map(str, key)).replace("+", "_")
        folder.mkdir(parents=True, exist_ok=True)
        recipe.train(
            loaded.module, data, TrainingRun(folder, seed, {**CPU, "callbacks": [course]}, Reporter())
        )


if __name__ == "__main__":
    main()
