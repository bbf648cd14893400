"""How long a step of each way takes, as a ratio to uniform LSQ, interleaved in one run.

    python -m experiments.cifar_qat.steps --data FOLDER --work FOLDER

The folders are those of ``experiments.cifar_qat.run``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from dqss.lit.objective import Objective
from dqss.lit.qat import Phase, QATTraining
from dqss.lit.qat_build import build_qat
from dqss.lit.training_data import TrainingData
from dqss.progress import Reporter
from experiments.cifar_qat.network import Cifar, float_network
from experiments.cifar_qat.run import ROWS
from experiments.harness import quiet

TIMED = ("uniform_lsq", "dqss", "gumbel", "mean_field", "bilevel")
BATCHES = {"bilevel": 2}
"""Passes that are one step: of the logits and of everything else in turn."""


def steps_of(row: str, model: nn.Module, data: Cifar, bits: int, batch_size: int) -> Callable[[], None]:
    """A function that does one whole step: pass, way back, optimizer."""
    found = ROWS[row]
    settings = found.settings(10)
    train = TrainingData.of(data.training(batch_size))
    space = found.space(bits, 0, model)
    device = torch.device("cpu")
    work = build_qat(
        copy.deepcopy(model), data.calibration(0), train, space, settings, 0, None, device, Reporter()
    )
    phase = Phase("search", 10_000, settings.warmup, settings.schedule, settings.update)
    module = QATTraining(work.supernet, phase, Objective(work.teacher, work.distance), train, settings, 0)
    module.train()
    optimizer = module.configure_optimizers()["optimizer"]
    batch = train.batch(range(batch_size))

    def step() -> None:
        for _ in range(BATCHES.get(row, 1)):
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            work.supernet.constrain()

    return step


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    data = Cifar(arguments.data)
    model = float_network(data, arguments.work)
    steps = {row: steps_of(row, model, data, arguments.bits, arguments.batch_size) for row in TIMED}
    seconds: dict[str, list[float]] = {row: [] for row in TIMED}
    for turn in range(arguments.rounds + 3):
        for row, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 3:  # before that they compile
                seconds[row].append(time.perf_counter() - started)
    base = median(seconds["uniform_lsq"])
    print("| step | ratio to uniform LSQ |")
    print("|---|---|")
    for row, values in seconds.items():
        print(f"| {row} | {median(values) / base:.2f} |")


if __name__ == "__main__":
    main()
