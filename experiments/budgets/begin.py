"""Study: where may a search within a budget begin, and what do measured steps from there gain elsewhere?

    python -m experiments.budgets.begin resnet56 --data FOLDER --target w6a8 --seed 0

KL on the images that are searched on and on the 1,000 that choose defaults, or with ``--all`` on those that
report and all that the seed did not draw, of the strategies that the integer program finds by estimates with
and without slopes, drawn towards the mean curvature or as they come; and after steps that must gain so many
standard errors (``--confidence``). See README.md here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dqss.descent
from dqss.lit.settings import PTQSettings
from dqss.supernet import Assignment
from dqss.uniform import widest
from experiments.budgets import baselines
from experiments.budgets.elsewhere import unseen
from experiments.budgets.run import CHECKPOINTS, TARGETS, of_cifar
from experiments.harness import quiet

FEW = 20
PASSES = 25.0


def main() -> None:
    """Print a line for each strategy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("network", choices=CHECKPOINTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="w4a8", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="measure on all images that chose nothing")
    parser.add_argument("--confidence", type=float, nargs="*", default=[])
    arguments = parser.parse_args()
    quiet(arguments.threads)
    study = of_cifar(arguments.network, arguments.data, PTQSettings(discrete_every=0))
    begun = study.prepared(TARGETS[arguments.target], arguments.seed)
    evaluator, limits = begun.evaluator, begun.limits
    evaluator.parts = {**evaluator.parts, "refine": evaluator.parts["search"]}
    dev = study.dev
    assert dev is not None
    others = [study.held_out, unseen(study, arguments.data, arguments.seed)] if arguments.all else [dev]

    def tell(name: str, assignment: Assignment) -> None:
        each = sorted(evaluator.measure_each(assignment, "refine"), reverse=True)
        parts = [other.measure(evaluator.supernet, assignment).each for other in others]
        elsewhere = float(torch.cat(parts).mean())
        mean, median, few = sum(each) / len(each), each[len(each) // 2], sum(each[:FEW]) / sum(each)
        found = f"{mean:.5f} (median {median:.5f}, the worst {FEW} images {few:.0%})"
        print(f"{name}: searched on {found}, elsewhere {elsewhere:.5f}", flush=True)

    tell("best uniform", begun.best_uniform())
    tell("hessian", limits.solve(baselines.hessian(evaluator)))
    wide, start = widest(evaluator.supernet), {}
    found = evaluator.second_order(wide, "search", dqss.descent.WATCHED, group=1, alone=True)
    start["estimates"] = limits.solve(found.effects)
    start["without slopes, as they come"] = limits.solve({n: found.noise[n][k] for n, k in wide.items()})
    for name, alone in zip(("without slopes, drawn together", "the same, softer"), found.alone, strict=False):
        start[name] = limits.solve(alone)
    for name, assignment in start.items():
        tell(name, assignment)
    best = min(start, key=lambda name: evaluator.measure(start[name], "refine"))
    for confidence in arguments.confidence:
        dqss.descent.CONFIDENCE = confidence
        after, _ = dqss.descent.descend(evaluator, start[best], limits, PASSES)
        tell(f"{best}, then steps that gain {confidence:g} standard errors", after)


if __name__ == "__main__":
    main()
