"""Study: where does a repaired strategy lose what it still loses? See README.md here.

    python -m experiments.repair.where --data FOLDER --work FOLDER --mobilenet FILE --strategies NAME ...

Names are those of folders that ``experiments.repair.run`` has left in WORK. Rows go to where.csv:

* ``kl``: KL to the float network on the images that report, of the strategy, with inputs of all layers in
  float, and with weights (and biases) in float.
* ``end of``: squared error of what a stage gives over the mean square of what it should be.
* ``total``, ``from above``, ``own``: the same of a layer's output; with the layer in float, fed by what comes
  in from above; and of the layer by itself, fed by the float network.
* ``at once``, ``in batches``, ``the two``: errors of the output for all images in one batch and for few at a
  time, which rounds sums in floats otherwise; and of one to the other.

``unseen`` is on the images of the selection, from which nothing has learned, ``learned`` on some of those
from which everything has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.apply import apply_strategy, prepared_network
from dqss.attach import INPUT_QUANTIZER
from dqss.bundle import Bundle, load
from dqss.calls import call_model
from dqss.repair.found import input_quantizers
from experiments.harness import CPU, Table, preset, quiet, study_parser
from experiments.repair.run import CHECKPOINTS, Setting, Subject

HERE = Path(__file__).parent
COLUMNS = ("network", "seed", "strategy", "what", "where", "unseen", "learned")
STAGES = tuple(f"blocks.{number}" for number in range(7))
LEARNED = 60
"""Images that were learned from: the first ones."""
FEW = 10
"""Images at a time, of which all layers' inputs and outputs are kept."""
Seen = dict[str, tuple[Tensor, Tensor]]
"""Input and output of modules, by name."""


class Where:
    """One strategy of a study, and its network beside the float one."""

    def __init__(self, study: Subject, bundle: Bundle, unseen: Tensor, learned: Tensor) -> None:
        self.study, self.bundle, self.images = study, bundle, (unseen, learned)
        self.exact = prepared_network(study.model, bundle).eval()
        self.network = apply_strategy(study.model, bundle)

    def kls(self) -> Iterator[tuple[str, float]]:
        """Of the strategy, and with one half of it in float."""
        measure = self.study.held_out.measure_module
        yield "all", measure(self.network).kl
        network = apply_strategy(self.study.model, self.bundle)
        for name in input_quantizers(network):
            setattr(network.get_submodule(name), INPUT_QUANTIZER, nn.Identity())
        yield "inputs in float", measure(network).kl
        network = apply_strategy(self.study.model, self.bundle)
        for name in self.bundle.strategy.layers:
            layer, exact = network.get_submodule(name), self.exact.get_submodule(name)
            layer.weight, layer.bias = exact.weight, exact.bias
        yield "weights in float", measure(network).kl

    def errors(self) -> Iterator[tuple[str, str, float, float]]:
        """Of stages and of layers: which, where, on the unseen images and on learned ones."""
        sums = [self._sums(images) for images in self.images]
        for what, name in sums[0]:
            yield what, name, *(float(found[what, name][0] / found[what, name][1]) for found in sums)
        outputs = [[once(self.exact, x), once(self.network, x), few(self.network, x)] for x in self.images]
        for what, one, other in (("at once", 1, 0), (f"in batches of {FEW}", 2, 0), ("the two", 1, 2)):
            sizes = (squares(each[one], each[other]) for each in outputs)
            yield what, "output", *(float(errors / size) for errors, size in sizes)

    def _sums(self, images: Tensor) -> dict[tuple[str, str], Tensor]:
        """Squared errors, and squares of what should be, ``[2]`` each."""
        layers = list(self.bundle.strategy.layers)
        sums: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        for batch in images.split(FEW):
            exact, found = (watch(one, [*STAGES, *layers], batch) for one in (self.exact, self.network))
            for name in STAGES:
                sums["end of", name] += squares(found[name][1], exact[name][1])
            for name in layers:
                (clean, wanted), (dirty, made) = exact[name], found[name]
                sums["total", name] += squares(made, wanted)
                sums["from above", name] += squares(self.exact.get_submodule(name)(dirty), wanted)
                sums["own", name] += squares(self.network.get_submodule(name)(clean), wanted)
        return sums


def once(network: nn.Module, images: Tensor) -> Tensor:
    """The output for all images at once."""
    output: Tensor = network(images)
    return output


def few(network: nn.Module, images: Tensor) -> Tensor:
    """The output for some images at a time: the same but for the rounding of sums in floats."""
    return torch.cat([network(batch) for batch in images.split(FEW)])


def squares(found: Tensor, wanted: Tensor) -> Tensor:
    """``[2]``: sum of squared errors, and of squares of what is wanted."""
    return torch.stack([(found - wanted).double().square().sum(), wanted.double().square().sum()])


def watch(network: nn.Module, names: list[str], images: Tensor) -> Seen:
    """What modules are given and give."""
    seen: Seen = {}
    with ExitStack() as stack:
        for name in names:
            hook = partial(_note, seen, name)
            stack.callback(network.get_submodule(name).register_forward_hook(hook).remove)
        call_model(network, images)
    return seen


def _note(seen: Seen, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    seen[name] = args[0].clone(), output.clone()  # networks write into their tensors


@torch.no_grad()
def main() -> None:
    """Compute the rows of strategies that have none."""
    parser = study_parser(__doc__, HERE / "where.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path, required=True, help=CHECKPOINTS["mobilenet"])
    parser.add_argument("--strategies", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=5)
    study = Subject.imagenet("mobilenet", arguments.data, arguments.mobilenet, preset("ptq"), CPU)
    setting = Setting(study, "W4A8", "8", arguments.seed, arguments.work / "ptq")
    learned, unseen = (setting.samples.batch(part) for part in setting.parts())
    for strategy in arguments.strategies:
        key = (study.name, arguments.seed, strategy)
        where = Where(study, load(setting.folder / strategy), unseen, learned[:LEARNED])
        if table.has(*key, "the two", "output"):
            continue
        for name, kl in where.kls():
            table.add(*key, "kl", name, kl, "")
        for what, name, *errors in where.errors():
            table.add(*key, what, name, *errors)


if __name__ == "__main__":
    main()
