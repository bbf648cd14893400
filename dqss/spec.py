"""What a quantizer is, in plain frozen types: granularity, grid, algorithm. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

MIN_BITS, MAX_BITS = 2, 16

MIDDLE = -0.5
"""The zero point of a signed grid with as many values above zero as below, and no zero."""


class Role(Enum):
    """What a quantized tensor is to its layer; an operand of a product is an activation."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    @property
    def title(self) -> str:
        """For tables."""
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis`` (negative axes count from the end)."""

    axis: int = 0

    @property
    def title(self) -> str:
        """For tables; the axis is the layer's own affair."""
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbouring values of each index along ``axis``.

    What is left of the tensor for one index is flattened in its own order; its last group is
    shorter where ``size`` does not divide it. For weights only.
    """

    size: int
    axis: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group of {self.size} values: expected 1 or more")

    @property
    def title(self) -> str:
        """For tables; the axis is the layer's own affair."""
        return f"group {self.size}"


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of a quantizer.

    Symmetric grids have the zero point 0. Signed ones are ``[-2^(b-1), 2^(b-1) - 1]``; unsigned
    ones, for tensors that are never negative, ``[0, 2^b - 1]``: negative values become zero.
    Affine grids are ``[0, 2^b - 1]`` with an integer zero point inside, and never ``signed=False``.
    """

    bits: int
    symmetric: bool
    granularity: Granularity = field(default_factory=PerTensor)
    signed: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits}: expected {MIN_BITS}..{MAX_BITS}")
        if not self.signed and not self.symmetric:
            raise ValueError("signed=False: only symmetric grids are signed or unsigned; affine ones shift")

    @property
    def mirrored(self) -> bool:
        """Whether the range is the same on both sides of zero: symmetric and signed."""
        return self.symmetric and self.signed

    @property
    def qmin(self) -> int:
        """Smallest integer code, inclusive."""
        return -(1 << (self.bits - 1)) if self.mirrored else 0

    @property
    def qmax(self) -> int:
        """Largest integer code, inclusive."""
        return (1 << (self.bits - 1)) - 1 if self.mirrored else (1 << self.bits) - 1

    @property
    def scheme(self) -> str:
        """The grid in words, without its bits: ``unsigned symmetric tensor``."""
        sign = "affine" if not self.symmetric else "symmetric" if self.signed else "unsigned symmetric"
        return f"{sign} {self.granularity.title}"


@dataclass(frozen=True)
class Candidate:
    """One option of a tensor's decision: an algorithm with its parameters, and a grid.

    ``params`` is a sorted tuple of pairs, so that candidates are hashable; build one with
    :meth:`of` and read them back as :attr:`kwargs`.
    """

    algorithm: str
    spec: QuantSpec
    params: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, algorithm: str, spec: QuantSpec, params: Mapping[str, float] | None = None) -> Candidate:
        """Make a candidate; ``params`` are the algorithm's keyword arguments."""
        return cls(algorithm, spec, tuple(sorted((params or {}).items())))

    @property
    def kwargs(self) -> dict[str, float]:
        """The algorithm's keyword arguments."""
        return dict(self.params)

    @property
    def method(self) -> str:
        """The algorithm with its parameters, without the grid: ``percentile(p=99.9)``."""
        inside = ", ".join(f"{key}={value:.12g}" for key, value in self.params)
        return f"{self.algorithm}({inside})" if inside else self.algorithm

    @property
    def label(self) -> str:
        """Short name for tables: ``percentile(p=99.9)@4``."""
        return f"{self.method}@{self.spec.bits}"

    @property
    def kind(self) -> tuple[object, ...]:
        """What two candidates of different layers must share to be the same choice.

        The channel axis is the layer's own affair, so it does not count.
        """
        return (self.method, self.spec.bits, self.spec.scheme)

    @property
    def title(self) -> str:
        """The label with its grid spelled out: ``mse@4 symmetric channel``."""
        return f"{self.label} {self.spec.scheme}"
