"""What a quantizer is, in plain frozen types: granularity, grid, algorithm. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis`` (negative axes count from the end)."""

    axis: int = 0


Granularity: TypeAlias = PerTensor | PerChannel


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of a quantizer.

    Symmetric grids are signed, ``[-2^(b-1), 2^(b-1) - 1]`` with zero point 0.
    Affine grids are unsigned, ``[0, 2^b - 1]`` with an integer zero point inside.
    """

    bits: int
    symmetric: bool
    granularity: Granularity = field(default_factory=PerTensor)

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits}: expected {MIN_BITS}..{MAX_BITS}")

    @property
    def qmin(self) -> int:
        """Smallest integer code, inclusive."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest integer code, inclusive."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


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
        return (self.method, self.spec.bits, self.spec.symmetric, type(self.spec.granularity).__name__)

    @property
    def title(self) -> str:
        """The label with its grid spelled out: ``mse@4 symmetric channel``."""
        sign = "symmetric" if self.spec.symmetric else "affine"
        grain = "channel" if isinstance(self.spec.granularity, PerChannel) else "tensor"
        return f"{self.label} {sign} {grain}"
