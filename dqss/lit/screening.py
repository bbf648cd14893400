"""Uniform strategies measured before a search, for what they show of each algorithm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dqss.budget.limits import Limits
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.progress import Reporter
from dqss.supernet import Assignment
from dqss.uniform import FIRST_RUNG, Screening, screen, shown_effects


def screen_uniform(
    evaluator: Evaluator, uniform: dict[str, Assignment], settings: PTQSettings, reporter: Reporter
) -> Screening:
    """See :func:`dqss.uniform.screen`, with its progress told."""
    first = settings.screen_images or FIRST_RUNG
    with reporter.stage("screen", len(uniform) * first) as stage:
        evaluator.advance = stage.advance
        found = screen(evaluator, uniform, settings.finalists, first)
    evaluator.advance = lambda images: None
    return found


def shown_by(
    evaluator: Evaluator,
    uniform: Mapping[str, Assignment],
    screened: Screening | None,
    limits: Limits | None,
) -> dict[str, Tensor] | None:
    """What the search may begin with: nothing under a budget, where no strategy may have the best options."""
    if screened is None or limits is not None:
        return None
    return shown_effects(evaluator.supernet, uniform, screened.scores)
