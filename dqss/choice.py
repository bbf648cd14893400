"""What was chosen for one tensor and one layer, as validated JSON. No torch here."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from dqss.io import finite_json
from dqss.spec import MAX_BITS, MIN_BITS, Candidate, Granularity, PerChannel, PerGroup, PerTensor, QuantSpec

Name = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FreeJson = Annotated[dict[str, JsonValue], AfterValidator(finite_json)]
"""Any JSON object; infinite and NaN numbers become null."""


class StrictModel(BaseModel):
    """Part of a file: nothing unknown in it, nothing converted."""

    # Strict: a file with "4" for 4 or true for 1 was edited, and nothing is guessed about it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PerTensorField(StrictModel):
    """:class:`dqss.spec.PerTensor` in a file."""

    type: Literal["per_tensor"]

    def granularity(self) -> Granularity:
        """The type that quantizers use."""
        return PerTensor()


class PerChannelField(StrictModel):
    """:class:`dqss.spec.PerChannel` in a file."""

    type: Literal["per_channel"]
    axis: int

    def granularity(self) -> Granularity:
        """The type that quantizers use."""
        return PerChannel(self.axis)


class PerGroupField(StrictModel):
    """:class:`dqss.spec.PerGroup` in a file."""

    type: Literal["per_group"]
    size: Annotated[int, Field(ge=1)]
    axis: int = 0

    def granularity(self) -> Granularity:
        """The type that quantizers use."""
        return PerGroup(self.size, self.axis)


_GranularityFields: TypeAlias = PerTensorField | PerChannelField | PerGroupField
GranularityField = Annotated[_GranularityFields, Field(discriminator="type")]
UNION_TAGS = {("granularity", tag) for tag in ("per_tensor", "per_channel", "per_group")}


def _granularity_field(granularity: Granularity) -> _GranularityFields:
    if isinstance(granularity, PerGroup):
        return PerGroupField(type="per_group", size=granularity.size, axis=granularity.axis)
    if isinstance(granularity, PerChannel):
        return PerChannelField(type="per_channel", axis=granularity.axis)
    return PerTensorField(type="per_tensor")


class TensorChoice(StrictModel):
    """The option that was chosen for one tensor.

    Attributes:
        algorithm: name of the algorithm; ``params`` are its keyword arguments.
        bits: width of the integer grid; ``symmetric``, ``signed`` and ``granularity`` as in
            ``QuantSpec``.
        probability: softmax probability of the option when the search ended, if it had one.
        margin: that probability minus the runner-up's.
        decision: name of the decision that chose; tied tensors share one.
        tuned: whether what the algorithm gave was tuned, before the search (``adaround``) or after it, see
            :mod:`dqss.repair`. A weight has then its integer codes in the tensors file, since rounding to
            the nearest would not give them; an activation only has another scale there.
    """

    algorithm: Name
    params: dict[str, Finite] = {}
    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    symmetric: bool
    signed: bool = True
    granularity: GranularityField
    probability: Probability | None = None
    margin: Finite | None = None
    decision: Name
    tuned: bool = False

    @model_validator(mode="after")
    def _check_signed(self) -> TensorChoice:
        if not self.signed and not self.symmetric:
            raise ValueError("signed is false, which only a symmetric grid can be")
        return self

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        *,
        decision: str,
        probability: float | None = None,
        margin: float | None = None,
    ) -> TensorChoice:
        """Record ``candidate`` as the choice of ``decision``."""
        if probability is not None and 1.0 < probability < 1.0 + 1e-6:
            probability = 1.0  # a sum of rounded probabilities
        return cls(
            algorithm=candidate.algorithm,
            params=candidate.kwargs,
            bits=candidate.spec.bits,
            symmetric=candidate.spec.symmetric,
            signed=candidate.spec.signed,
            granularity=_granularity_field(candidate.spec.granularity),
            probability=probability,
            margin=margin,
            decision=decision,
        )

    def candidate(self) -> Candidate:
        """The candidate that was chosen."""
        spec = QuantSpec(self.bits, self.symmetric, self.granularity.granularity(), self.signed)
        return Candidate.of(self.algorithm, spec, self.params)


class LayerStrategy(StrictModel):
    """The choices of one layer; None leaves that tensor in float.

    Attributes:
        weight, activation: of the layer and of its input.
        bias_corrected: whether the tensors file has a bias for it in place of its own.
    """

    weight: TensorChoice | None
    activation: TensorChoice | None
    bias_corrected: bool = False

    @field_validator("activation")
    @classmethod
    def _check_groups(cls, choice: TensorChoice | None) -> TensorChoice | None:
        if choice is not None and isinstance(choice.granularity, PerGroupField):
            raise ValueError("per_group is for weights")
        return choice


OPERANDS: dict[str, tuple[str, ...]] = {
    "matmul": ("left", "right"),
    "attention": ("query", "key", "probabilities", "value"),
}
"""Operands of the kinds of products. Attention is two products in one function."""


PointKind = Literal["sum", "concatenation", "pool", "output"]
OUTPUT: Final = "output"
"""The kind of point that is the output of a layer, and the name of its only operand."""
POINT_OPERANDS: dict[str, tuple[str, ...]] = {
    "sum": ("left", "right"),
    "concatenation": (),
    "pool": ("input",),
    OUTPUT: (OUTPUT,),
}
"""Operands of the kinds of points; those of a concatenation are numbers."""


class PointStrategy(StrictModel):
    """The choices of one point: where a tensor is quantized that no layer reads.

    Attributes:
        kind: ``sum``, ``concatenation`` or ``pool``, whose operands are quantized, or ``output``, that of
            a layer.
        operands: a choice by the operand's name; one that is not there stays in float.
    """

    kind: PointKind
    operands: dict[str, TensorChoice]

    @model_validator(mode="after")
    def _check_operands(self) -> PointStrategy:
        for name, choice in self.operands.items():
            number = self.kind == "concatenation" and name.isascii() and name.isdigit()
            if not number and name not in POINT_OPERANDS[self.kind]:
                known = ", ".join(POINT_OPERANDS[self.kind]) or "numbers"
                raise ValueError(f"operand {name!r}: {self.kind} has {known}")
            if not isinstance(choice.granularity, PerTensorField):
                raise ValueError("points are quantized per_tensor")
        return self


class ProductStrategy(StrictModel):
    """The choices of one product of two activations.

    Attributes:
        kind: ``matmul``, or ``attention`` for a scaled dot-product attention.
        operands: a choice by the operand's name; one that is not there stays in float.
    """

    kind: Literal["matmul", "attention"]
    operands: dict[str, TensorChoice]

    @model_validator(mode="after")
    def _check_operands(self) -> ProductStrategy:
        for name, choice in self.operands.items():
            if name not in OPERANDS[self.kind]:
                raise ValueError(f"operand {name!r}: {self.kind} has {', '.join(OPERANDS[self.kind])}")
            if not isinstance(choice.granularity, PerTensorField):
                raise ValueError("operands of products are quantized per_tensor")
        return self
