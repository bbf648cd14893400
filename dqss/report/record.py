"""What a run folder keeps for its report alone: nothing here is needed to use a strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dqss.choice import Finite, StrictModel
from dqss.errors import StrategyError
from dqss.io import StrPath, json_text, write_text_atomic
from dqss.strategy import one_line

RECORD_FILE = "report.json"

Name = str
DataUri = Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")]
"""A picture. The pattern keeps a stranger's file from leading the page anywhere else."""


class Histogram(StrictModel):
    """See :class:`dqss.observers.coarse.CoarseHistogram`."""

    low: Finite
    high: Finite
    counts: list[Annotated[int, Field(ge=0)]]
    zeros: int


class ClipRange(StrictModel):
    """What a candidate's grid represents: the median of its channels, and the ends of the widest."""

    low: Finite
    high: Finite
    lowest: Finite
    highest: Finite


class TensorRecord(StrictModel):
    """A tensor under search.

    Attributes:
        layer, role: as in the strategy.
        kind: class of the layer, or what kind of product it is.
        shape: of a weight; empty otherwise.
        decision: which chose.
        histogram: of its values when the candidates were calibrated.
        ranges: of each option.
    """

    layer: Name
    role: str
    kind: str
    shape: list[int]
    decision: Name
    histogram: Histogram | None
    ranges: list[ClipRange]


class DecisionRecord(StrictModel):
    """A decision when the search had ended.

    Attributes:
        labels, schemes: of each option: ``mse@4`` and ``symmetric channel``.
        outcome: for each option the number of what it comes to; options that are alike share it.
        probabilities: of each option.
        effects: on the loss of choosing each option, relative to the decision's mean; None where unknown.
        preferred: option of the largest logit.
        chosen: option that was exported.
    """

    labels: list[str]
    schemes: list[str]
    outcome: list[int]
    probabilities: list[Finite]
    effects: list[Finite] | None
    preferred: int
    chosen: int


class Gain(StrictModel):
    """By how much the exported strategy is closer to the float network than the best uniform one.

    Attributes:
        mean, error: of the paired differences of the distance, and the standard error of that mean.
        count: inputs of the selection part.
    """

    mean: Finite
    error: Finite
    count: int


class Answer(StrictModel):
    """A classifier's first class for one input, and its probability."""

    best: int
    probability: Finite


class Example(StrictModel):
    """One input, and what became of it.

    Attributes:
        index: among the calibration inputs.
        distance: of the exported strategy's output.
        target: its class, where known.
        answers: of a classifier, by network: ``float``, ``searched``.
        pictures: by name, in the order to be shown.
    """

    index: int
    distance: Finite
    target: int | None = None
    answers: dict[str, Answer] = Field(default={})
    pictures: dict[str, DataUri] = Field(default={})


class RunRecord(StrictModel):
    """All of it.

    Attributes:
        versions: of what the search ran on, by name.
        effects: how the decisions' effects are known.
        loss: what was minimized.
        gain: None where there is no uniform strategy.
        pictures: the outputs are pictures, and the examples are cut from them.
        distances: of the exported strategy on each input of the selection part.
    """

    version: Literal[1] = 1
    versions: dict[str, str]
    effects: Literal["mean_field", "first_order", "unknown"]
    loss: str
    gain: Gain | None
    pictures: bool
    tensors: list[TensorRecord]
    decisions: dict[Name, DecisionRecord]
    distances: list[Finite | None]
    examples: list[Example]

    def save(self, folder: StrPath) -> None:
        """Write the record into a run folder."""
        write_text_atomic(Path(folder, RECORD_FILE), json_text(self.model_dump()))

    @classmethod
    def load(cls, folder: StrPath) -> RunRecord | None:
        """The record of a run folder; None where it has none.

        Raises:
            StrategyError: where it is damaged.
        """
        file = Path(folder, RECORD_FILE)
        if not file.exists():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            fault = str(error).splitlines()[0]
            raise StrategyError(one_line(f"{file}: damaged ({fault}): remove it, or search again")) from error
