"""From a calibrated supernet to a strategy: screen, search, discretize. What all searches have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from dqss.budget.limits import Limits
from dqss.discretize import Discretized, discretize
from dqss.lit.checkpoint import Deadline
from dqss.lit.clock import Clock
from dqss.lit.fit import fit_ptq, settled
from dqss.lit.ptq import PTQSearch
from dqss.lit.screening import screen_uniform, shown_by
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.progress import Reporter
from dqss.recompute import recomputing
from dqss.supernet import Assignment
from dqss.uniform import FIRST_RUNG, Screening, affordable, uniform_assignments

REFINE_SHARE = 0.85
"""Share of ``max_minutes`` at which the refinement stops; see also :data:`dqss.lit.fit.SEARCH_SHARE`."""


@dataclass(frozen=True)
class Chosen:
    """What was found.

    Attributes:
        module: the search, after its last step.
        uniform: the uniform strategies, within the limits.
        outcome: all contenders, and which of them won.
    """

    module: PTQSearch
    uniform: dict[str, Assignment]
    outcome: Discretized

    @property
    def exported(self) -> Assignment:
        """The winner."""
        return self.outcome.assignments[self.outcome.exported]


def choose(
    evaluator: Evaluator,
    settings: PTQSettings,
    seed: int,
    folder: Path | None,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    *,
    logger: Logger | bool = False,
    limits: Limits | None = None,
    deadline: Deadline | None = None,
    clock: Clock | None = None,
) -> Chosen:
    """Search the decisions of a calibrated supernet and compare with the uniform strategies.

    Args:
        evaluator: holds the supernet; the search leaves it settled, on its device.
        settings: of the search.
        seed: of batches and noise.
        folder: of checkpoints; None keeps everything in memory.
        reporter: progress.
        trainer: further arguments of Lightning's trainer.
        logger: of Lightning.
        limits: of a budget.
        deadline: after which nothing more is tried; None: there is none.
        clock: that is told how long each stage took.
    """
    deadline, clock = deadline or Deadline(None), clock or Clock()
    supernet = evaluator.supernet
    uniform = affordable(supernet, uniform_assignments(supernet), limits)
    settings = settled(settings, supernet)
    screened = None
    if settings.screen_first and uniform:
        with clock.time("screen"):
            screened = screen_uniform(evaluator, uniform, settings, reporter)
    shown = shown_by(evaluator, uniform, screened, limits)
    with recomputing(supernet, settings.recompute or ()):
        with clock.time("search"):
            module = fit_ptq(
                evaluator, settings, seed, folder, deadline, reporter, trainer, logger, limits, shown
            )
            supernet.to(evaluator.device)
        with clock.time("discretize"):
            begun = [] if module.steering is None else module.steering.begin()
            outcome = _discretize(
                evaluator, module.found, uniform, settings, deadline, reporter, limits, screened, begun
            )
    return Chosen(module, uniform, outcome)


def _discretize(
    evaluator: Evaluator,
    found: Sequence[Assignment],
    uniform: dict[str, Assignment],
    settings: PTQSettings,
    deadline: Deadline,
    reporter: Reporter,
    limits: Limits | None,
    screened: Screening | None,
    begun: Sequence[Assignment],
) -> Discretized:
    images = len(evaluator.parts["refine"])
    programs = 0 if limits is None else settings.refine.program_passes * images
    planned = int(settings.refine.limit(images) + programs)
    with reporter.stage("discretize", planned) as stage:
        # Not before: a step of the search ends in a checkpoint of its own.
        evaluator.advance = stage.advance
        # Now, and not with the first measurement: a resumed run may find that in its journal.
        evaluator.reference(evaluator.parts["select"])
        return discretize(
            evaluator,
            found,
            uniform,
            settings.refine,
            settings.finalists,
            settings.screen_images or FIRST_RUNG,
            lambda: deadline.passed(REFINE_SHARE),
            limits,
            screened,
            begun,
        )
