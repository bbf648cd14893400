"""Study: logits of activations learned in the same passes as roundings. See README.md here.

    python -m experiments.repair.logits --data FOLDER --work FOLDER --bits W4A4 --edges same --seeds 0 1 2

After ``mse`` and AdaRound layer by layer (kept in the folder of ``--work``, as ``run.py`` makes it),
roundings and biases of all layers learn end to end, and with them, in one of the rows, which of eight
candidates quantizes each activation: one is drawn a pass by its logit (straight-through Gumbel), and the
gradients of all reach theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.attach import INPUT_QUANTIZER
from dqss.measure import Evaluator
from dqss.mixing import GridStack, mix_fake_quantize
from dqss.progress import Reporter
from dqss.repair.found import Found
from dqss.repair.keeping import KeptSteps
from dqss.repair.network import NetworkReconstruction, _Learning
from dqss.repair.repair import _Work
from experiments.harness import Table, preset, quiet, study_parser
from experiments.repair.run import ADAROUND, COLUMNS, HERE, TOGETHER, Setting, Subject, inputs_of
from experiments.repair.starts import Source, Start

START, TEMPERATURE, RATE = 2.0, 1.0, 0.05
"""Logit of what is in place (the others have 0), of the softmax, and learning rate (Adam)."""


class Drawn(nn.Module):
    """An activation on the grid of one of its candidates, drawn anew in each pass.

    Args:
        candidates: with calibrated grids.
        place: the one that is in use.
        generator: of the draws.
    """

    def __init__(self, candidates: Any, place: int, generator: torch.Generator) -> None:
        super().__init__()
        self.candidates, self.generator = (
            [candidates[k] for k in range(len(candidates.candidates))],
            generator,
        )
        self.logits = nn.Parameter(torch.zeros(len(self.candidates)))
        self.logits.data[place] = START

    def forward(self, x: Tensor) -> Tensor:
        """On one grid; the gradient of the logits is that of the mixture."""
        uniform = torch.rand(len(self.logits), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        shares = torch.softmax((self.logits - torch.log(-torch.log(uniform))) / TEMPERATURE, 0)
        place = int(shares.argmax())
        weights = torch.nn.functional.one_hot(torch.tensor(place), len(shares)) + (shares - shares.detach())
        stack = GridStack.of([candidate.grid() for candidate in self.candidates], x.shape)
        return mix_fake_quantize(x, weights, stack, place)


class Jointly(NetworkReconstruction):
    """Roundings and biases, and the logits of activations instead of their steps, or neither.

    Attributes:
        evaluator: of a supernet with the candidates.
        places: which of them is in use, by decision; None: activations stay as they are.
        moved: how many activations ended at another candidate, of how many.
    """

    evaluator: Evaluator
    places: dict[str, int] | None
    moved: tuple[int, int] = (0, 0)

    @contextmanager
    def _learning(self) -> Iterator[_Learning]:
        with super()._learning() as found:
            steps = {id(step.shift) for step in found.steps.values()}
            found.groups = [group for group in found.groups if id(group["params"][0]) not in steps]
            for step in found.steps.values():
                step.learn = False
            self.drawn: dict[str, Drawn] = {}
            for name in found.steps if self.places is not None else ():
                mixed = self.evaluator.supernet.layers[name].activation
                assert mixed is not None and self.places is not None
                generator = torch.Generator().manual_seed(self.seed)
                self.drawn[name] = Drawn(mixed, self.places[mixed.decision.name], generator)
                setattr(self.network.get_submodule(name), INPUT_QUANTIZER, self.drawn[name])
                found.add(self.drawn[name].logits, RATE)
            yield found

    def put(self, found: Found) -> Callable[[], None]:
        """Candidates of activations too, where they were drawn."""
        undo = super().put(found)
        moved = 0
        for name, drawn in self.drawn.items():
            best = int(drawn.logits.detach().argmax())
            mixed = self.evaluator.supernet.layers[name].activation
            assert mixed is not None and self.places is not None
            moved += best != self.places[mixed.decision.name]
            setattr(self.network.get_submodule(name), INPUT_QUANTIZER, mixed[best])
        self.moved = moved, len(self.drawn)
        return undo


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--edges", default="same", choices=["same", "8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=5)
    settings = replace(preset("ptq"), discrete_every=0)
    study = Subject.resnet20(arguments.data, settings, {"accelerator": "cpu"})
    tuned = replace(ADAROUND, iterations=250, batch_size=16)
    for seed in arguments.seeds:
        setting = Setting(study, arguments.bits, arguments.edges, seed, arguments.work / "ptq")
        bundle = setting.repaired("mse+adaround", tuned, "_250x16")
        _, evaluator = setting._build(Start(Source.MSE))
        places = inputs_of(evaluator, bundle)
        for row, start in (("network_logits", places), ("network_without_steps", None)):
            key = (study.name, arguments.bits, arguments.edges, seed, f"mse+adaround+{row}_250x16")
            if table.has(*key):
                continue
            work = _Work(study.model, bundle, setting.inputs(), TOGETHER, None, seed, Reporter(), None, False)
            weights = work._weights()
            codes = {name: (weight, work.codes_of(name, weight)) for name, (weight, _) in weights.items()}
            given = (work.samples, work.learned(), evaluator.distance, TOGETHER, seed)
            task = Jointly(work.quantized, work.exact, codes, *given)
            task.evaluator, task.places = evaluator, start
            started = time.perf_counter()
            _, errors = task.run(KeptSteps(None, ""))
            seconds = time.perf_counter() - started
            quality = study.held_out.measure_module(work.quantized)
            dev = float("nan") if study.dev is None else study.dev.measure_module(work.quantized).kl
            gain = quality.gain_over(study.held_out.float())
            print(row, "moved", *task.moved, errors)
            table.add(*key, quality.kl, quality.top1, *gain, dev, 0.0, seconds)


if __name__ == "__main__":
    main()
