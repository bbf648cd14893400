"""Study: how far is the simulation from itself, if every layer rounds its sums another way? See README.md.

    python -m experiments.export.control --data FOLDER --mobilenet FILE --efficientnet FILE

Every output of every layer is changed by a relative 2^-23, up or down at random: about what another
order of the same sums does. What comes of it at the end is what no file can be asked to be nearer
than.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.apply import apply_strategy
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.deploy.compared import Whole
from dqss.measure import batches
from dqss.samples import Samples
from experiments.export.networks import NETWORKS, Files
from experiments.export.run import BITS, HERE, TARGETS, drawn, strategy
from experiments.harness import Table, quiet

COLUMNS = ("network", "bits", "target", "inputs", "error", "agreement")
ROUNDING = 2.0**-23


def rounded_otherwise(model: nn.Module, layers: Iterable[str], seed: int) -> None:
    """From now on every output of ``layers`` is off by a rounding."""
    generator = torch.Generator().manual_seed(seed)

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
        return output * (1.0 + ROUNDING * signs)

    modules = dict(model.named_modules())
    for name in layers:
        modules[name].register_forward_hook(change)


@torch.no_grad()
def compare(one: nn.Module, other: nn.Module, samples: Samples) -> Whole:
    """Two simulations on the same inputs."""
    total, size = Whole(), 25 if samples.uniform else 1
    for run in batches(range(len(samples)), size):
        wanted, found = (first_tensor(call_model(model, samples.batch(run))) for model in (one, other))
        total.add(len(run), wanted, wanted, found)
    return total


@torch.no_grad()
def top1(model: nn.Module, samples: Samples) -> float:
    """Share of right answers."""
    right = 0
    for run in batches(range(len(samples)), 25):
        targets: Any = samples.targets(run)
        right += int((first_tensor(call_model(model, samples.batch(run))).argmax(1) == targets).sum())
    return right / len(samples)


def print_top1(model: nn.Module, bundle: Bundle, samples: Samples, seeds: int) -> None:
    """Of the simulation as it is, and with its sums rounded in so many other ways."""
    print(f"as it is: {top1(apply_strategy(model, bundle), samples):.2%}")
    for seed in range(seeds):
        changed = apply_strategy(model, bundle)
        rounded_otherwise(changed, bundle.strategy.layers, seed)
        print(f"rounded otherwise, seed {seed}: {top1(changed, samples):.2%}", flush=True)


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path)
    parser.add_argument("--efficientnet", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--images", type=int, help="at most so many")
    parser.add_argument("--top1", type=int, default=0, help="print top-1 for so many seeds instead")
    arguments = parser.parse_args()
    quiet(1)
    table = Table(HERE / "controls.csv", COLUMNS, keys=3)
    files = Files(arguments.data, arguments.mobilenet, arguments.efficientnet)
    if arguments.top1:
        one = NETWORKS[arguments.networks[0]](files)
        bundle = strategy(one, arguments.bits[0], TARGETS[arguments.targets[0]])
        return print_top1(one.model, bundle, one.samples, arguments.top1)
    for name in arguments.networks:
        missing = [
            (bits, target)
            for bits in arguments.bits
            for target in (arguments.targets if bits in ("W8A8", "W4A8") else ["canonical"])
            if not table.has(name, bits, target)
        ]
        case = NETWORKS[name](files) if missing else None
        for bits, target in missing:
            assert case is not None
            samples = drawn(case.samples, arguments.images)
            bundle = strategy(case, bits, TARGETS[target])
            plain, changed = (apply_strategy(case.model, bundle) for _ in range(2))
            rounded_otherwise(changed, bundle.strategy.layers, 0)
            found = compare(plain, changed, samples)
            agreement = "" if found.agreement is None else found.agreement
            table.add(name, bits, target, found.count, f"{found.relative_error:.2g}", agreement)


if __name__ == "__main__":
    main()
