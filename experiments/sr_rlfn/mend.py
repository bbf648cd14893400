"""Study: what brings back what eight bits lose? See README.md here.

    python -m experiments.sr_rlfn.mend --data FOLDER

One pair of algorithms for all tensors (below eight bits, the first and the last layer at eight), so that
nothing is searched; then what changes no choice: learned
rounding and steps, corrected biases. Rows are appended to mend.csv, once each.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from dqss import __version__
from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle
from dqss.lit.build import build
from dqss.lit.settings import PTQSettings
from dqss.losses import Distance, LumaSquaredError
from dqss.progress import Reporter
from dqss.repair import repair_strategy
from dqss.samples import Samples, split
from dqss.search_spaces import uniform
from dqss.strategy import ModelInfo, utc_now
from dqss.uniform import uniform_assignments
from experiments.harness import Table, quiet, study_parser
from experiments.sr_rlfn.run import EDGES, NETWORK, PATCH, SHORT, Study

HERE = Path(__file__).parent
COLUMNS = ("weight_bits", "bits", "seed", "pair", "prepared", "repair", "set5", "set14", "mse", "seconds")
INFO = ModelInfo(source="dqss", name="rlfn_x4", weights_sha256="", tensors={}, prepare=[])
REPAIRS = {
    "none": replace(SHORT, iterations=0),
    "biases": replace(SHORT, iterations=0, bias_correction=True),
    "layers": SHORT,
    "layers+biases": replace(SHORT, bias_correction=True),
    "layers+steps": replace(SHORT, learn_steps=True),
    "layers+steps_2": replace(SHORT, learn_steps=True, batch_size=2),
    "network": NETWORK,
    "network_2": replace(NETWORK, batch_size=2),
    "network_2_600": replace(
        NETWORK,
        batch_size=2,
        network_iterations=600,
        network_learning_rate=0.006,
        network_step_learning_rate=0.002,
    ),
    "network_2_flip": replace(NETWORK, batch_size=2, augment=("flip",)),
    "network_2_luma": replace(NETWORK, batch_size=2),
    "layers+steps+network": replace(SHORT, learn_steps=True, network_iterations=300),
}
DISTANCES: dict[str, Distance] = {"network_2_luma": LumaSquaredError()}
"""That are tuned for, where it is not the squared error of all colours."""
PREPARED: dict[str, dict[str, bool]] = {"plain": {}, "smoothed": {"smooth": True}}
"""Settings of the search that make another float network of the same function."""


class Mended:
    """One pair of algorithms on the network, prepared in one way; whatever repair makes of it."""

    def __init__(
        self,
        study: Study,
        weight_bits: int,
        bits: int,
        seed: int,
        pair: str,
        prepared: str,
        patch: int = PATCH,
    ) -> None:
        self.study, self.seed = study, seed
        settings = replace(study.settings, **PREPARED[prepared])
        weight, activation = ([name] for name in pair.split("/"))
        self.patches = study.patches(seed, patch)
        self.device = torch.device("cpu")
        made, evaluator = build(
            study.model,
            self.patches,
            uniform(weight_bits, bits, weight, activation, edges=EDGES if weight_bits < 8 else (), name=pair),
            settings,
            seed,
            None,
            self.device,
            Reporter(),
        )
        (assignment,) = uniform_assignments(evaluator.supernet).values()
        first = self.patches.batch([0])
        fields = {
            "dqss": __version__,
            "created": utc_now(),
            "search_space": pair,
            "method": "",
            "budget": None,
        }
        self.bundle = make_bundle(evaluator.supernet, assignment, made, INFO, first, seed=seed, **fields)
        searched, selected = split(len(self.patches), settings.parts, seed)
        self.learned: Samples = self.patches.subset(searched)
        self.held = self.patches.batch(selected)

    def repaired(self, name: str) -> Bundle:
        """After the repair of that name."""
        return repair_strategy(
            self.study.model,
            self.bundle,
            self.learned,
            REPAIRS[name],
            seed=self.seed,
            device=self.device,
            distance=DISTANCES.get(name),
        ).bundle

    @torch.no_grad()
    def row(self, name: str) -> tuple[float, ...]:
        """PSNR on both sets in dB, squared error on the selection, seconds of the repair."""
        started = time.perf_counter()
        bundle = self.repaired(name)
        seconds = time.perf_counter() - started
        network = apply_strategy(self.study.model, bundle)
        error = (network(self.held) - self.study.model(self.held)).square().mean()
        return self.study.psnr(network, "Set5"), self.study.psnr(network, "Set14"), float(error), seconds


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "mend.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--weight-bits", type=int, help="another number for weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", default="mse/mse", help="algorithms of weights and inputs")
    parser.add_argument("--patch", type=int, default=PATCH, help="pixels a side of a patch")
    parser.add_argument("--prepared", default="plain", choices=PREPARED)
    parser.add_argument("--repair", nargs="+", default=["none"], choices=REPAIRS)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=6)
    row = (arguments.weight_bits or arguments.bits, arguments.bits, arguments.seed, arguments.pair)
    patches = "" if arguments.patch == PATCH else f"_{arguments.patch}px"
    key = (*row, arguments.prepared + patches)
    wanted = [name for name in arguments.repair if not table.has(*key, name)]
    if not wanted:
        return
    study = Study(arguments.data, PTQSettings(batch_size=2, discrete_every=0))
    mended = Mended(study, *row, arguments.prepared, arguments.patch)
    for name in wanted:
        table.add(*key, name, *mended.row(name))


if __name__ == "__main__":
    main()
