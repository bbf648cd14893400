"""Everything about a PTQ search but model, inputs and search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dqss.budget.limits import Budget
from dqss.checks import check_least, check_positive
from dqss.discretize import PASSES, RefineSettings
from dqss.errors import UserError
from dqss.lit.schedules import MeanFieldSchedule, Schedule
from dqss.lit.settling import Settling
from dqss.losses import Distance, SearchLoss
from dqss.repair import RepairSettings
from dqss.uniform import FIRST_RUNG

EASY_BITS = 8
"""A search whose candidates all have so many bits or more is easy: there is little to lose.

At three and at six bits four times as much found better strategies (``experiments/cifar_resnet20``).
"""
STEPS, EASY_STEPS = 600, 120
BATCH_SIZE, EASY_BATCH_SIZE = 8, 4
"""At the same cost 600 steps of eight images found strategies that were no worse on other images than
those of 1,200 steps of four, and differed less from seed to seed (``experiments/cifar_resnet20``)."""
SCREEN_IMAGES, EASY_SCREEN_IMAGES = FIRST_RUNG, 8
EASY_PASSES = 0.0
"""Of the refinement of an easy search: it changed nothing in any (``experiments/imagenet_mobile``)."""
BUDGET_STEPS = 100
"""Steps of a search within a budget, which begins from estimates of all effects. Set on one network and one
seed, where an earlier form of the steps ended worse than it had begun after 300 and after 600 of them
(``experiments/budgets``); longer searches in the present form have not been measured."""

_POSITIVE = ("learning_rate", "finalists", "checkpoint_every", "discrete_images")
_POSITIVE_OR_NONE = ("steps", "batch_size", "screen_images", "stop_after", "max_minutes")


@dataclass(frozen=True)
class PTQSettings:
    """Settings of :func:`dqss.search_ptq`; the method group of the configuration.

    Attributes:
        steps: of the search; None: as many as its bits need, see :meth:`at`.
        batch_size: images a step; None: as many as its bits need. Each step draws or mixes once, so small
            batches go far.
        learning_rate: of schedules that use Adam on the logits.
        schedule: relaxation over the steps.
        distance: to the float network; None: KL for logits, MSE for images.
        loss: what is minimized; None: the distance.
        settle: when a decision is frozen to its choice.
        stop_after: the search ends when its argmax has not changed in so many steps at a low entropy,
            see :class:`dqss.lit.unchanged.Unchanged`; None: never before its last step.
        recompute: patterns of modules whose activations are computed anew on the way back, which
            saves memory and takes time; "auto": the blocks that the network repeats. See
            :func:`dqss.recompute.blocks`. None: none.
        parts: shares of the inputs for the search with its refinement, and for the selection.
        refine: how the argmax is re-decided.
        screen_first: whether the uniform strategies are measured before the search, which then
            begins with what they have shown of each algorithm; None: in an easy search, see :meth:`at`.
        screen_images: on which all uniform strategies are measured, the better ones on more; None:
            see :meth:`at`.
        finalists: uniform strategies that are measured on all of the part that is searched on; the
            best of them meets the searched one, there and on the selection part.
        oracle: measure every uniform strategy on the validation data, not only the finalists.
        budget: what the exported network may cost; None: whatever it takes.
        equalize: first equalize the weights of layers that follow one another (arXiv 1906.04721); the
            float network stays what it is.
        smooth: first move ranges of channels from activations into the weights that read them (arXiv
            2211.10438), wherever that is exact and the layers quantized alone are better for it.
        repair: tune the exported strategy (learned rounding, biases), see :class:`dqss.RepairSettings`;
            None: leave it.
        search_again: once weights are tuned, search activations again around them, at the bits they have.
        max_minutes: limit on the wall clock; the best so far is exported. Repair, and a search
            after it, come on top.
        checkpoint_every: steps.
        discrete_every, discrete_images: how often, and on how many images, the
            history measures the discrete network (0: never).
    """

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 0.3
    schedule: Schedule = field(default_factory=MeanFieldSchedule)
    distance: Distance | None = None
    loss: SearchLoss | None = None
    settle: Settling = field(default_factory=Settling)
    stop_after: int | None = None
    recompute: str | Sequence[str] | None = None
    parts: tuple[float, float] = (0.8, 0.2)
    refine: RefineSettings = field(default_factory=RefineSettings)
    screen_first: bool | None = None
    screen_images: int | None = None
    finalists: int = 4
    oracle: bool = False
    budget: Budget | None = None
    equalize: bool = False
    smooth: bool = False
    repair: RepairSettings | None = None
    search_again: bool = False
    max_minutes: float | None = None
    checkpoint_every: int = 20
    discrete_every: int = 50
    discrete_images: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))  # a list where a file gave them
        object.__setattr__(self, "recompute", _patterns(self.recompute))
        object.__setattr__(self, "repair", self.repair or None)  # an empty group of a file
        if not isinstance(self.repair, RepairSettings | None):
            raise UserError(f"method.repair={self.repair!r}: choose it as repair@method.repair=blocks")
        self._check_search_again()
        check_positive(self, "method", *_POSITIVE)
        check_positive(self, "method", *_POSITIVE_OR_NONE, optional=True)
        check_least(self, "method", 0, "discrete_every")
        if len(self.parts) != 2 or min(self.parts) <= 0 or sum(self.parts) > 1 + 1e-9:
            raise UserError(
                f"method.parts={list(self.parts)}: expected two positive shares of at most 1 in total"
            )
        if not isinstance(self.settle, Settling):
            raise UserError(f"method.settle={self.settle!r}: write method.settle.margin=0.9, or null there")

    def _check_search_again(self) -> None:
        if self.search_again and self.repair is None:
            raise UserError(
                "method.search_again=true: activations are searched again around tuned weights: "
                "choose repair@method.repair=layers, or blocks"
            )
        if self.search_again and self.repair is not None and self.repair.learn_steps:
            raise UserError(
                "method.search_again=true with method.repair.learn_steps=true: what is learned of the "
                "activations would be thrown away: choose one of them"
            )

    def at(self, bits: int) -> PTQSettings:
        """The same with nothing left open, for a search whose candidates have ``bits`` or more.

        Within a budget no search is easy: there is a choice to make between widths, whatever they are.
        """
        easy = bits >= EASY_BITS and not self._budgeted
        refine = self.refine
        if refine.passes is None:
            rescue = PASSES if refine.rescue_passes is None else refine.rescue_passes
            refine = replace(refine, passes=EASY_PASSES if easy else PASSES, rescue_passes=rescue)
        return replace(
            self,
            steps=self.steps or self._enough_steps(easy),
            batch_size=self.batch_size or (EASY_BATCH_SIZE if easy or self._estimated else BATCH_SIZE),
            screen_first=easy if self.screen_first is None else self.screen_first,
            screen_images=self.screen_images or (EASY_SCREEN_IMAGES if easy else SCREEN_IMAGES),
            refine=refine,
        )

    @property
    def _budgeted(self) -> bool:
        return self.budget is not None and bool(self.budget.given())

    @property
    def _estimated(self) -> bool:
        """Whether it begins from estimates of all effects."""
        return self._budgeted and self.schedule.informed_entropy is not None

    def _enough_steps(self, easy: bool) -> int:
        if self._estimated:
            return BUDGET_STEPS
        return EASY_STEPS if easy else STEPS

    def steps_at(self, bits: int) -> int:
        """The steps of a search whose candidates have ``bits`` or more."""
        steps = self.at(bits).steps
        assert steps is not None
        return steps


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One pattern or several as several."""
    found = (given,) if isinstance(given, str) else given
    if found is not None and not found:
        raise UserError("method.recompute=[]: name modules, or write auto, or null for none")
    return None if found is None else tuple(found)
