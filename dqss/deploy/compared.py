"""How a file compares with the simulation: part by part, and as a whole. No onnx here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dqss.arithmetic.kinds import FAKE_QUANTIZED
from dqss.deploy.marks import Call
from dqss.deploy.tolerance import Tolerance
from dqss.errors import ParityError

Array = np.ndarray[Any, Any]
SHOWN = 2
"""Modules that are named; along a residual branch it may be all of them."""


@dataclass(frozen=True)
class Part:
    """What computes one output of a cut graph from the integers given to it.

    Attributes:
        output: its name in the graph.
        modules: the modules in whose forward it multiplies.
        call: the quantizer whose integers it gives; None for an output of the network.
    """

    output: str
    modules: tuple[str, ...]
    call: Call | None = None

    def __str__(self) -> str:
        place = "the output"
        if self.call is not None:
            name, count = self.call
            place = f"{name} (call {count + 1})" if count else name
        before = len(self.modules) - SHOWN
        shown = ", ".join(self.modules[-SHOWN:]) + (f" and {before} before" if before > 0 else "")
        return f"{place}, computed by {shown}" if shown else place


FLOAT_NOISE = 1e-4
"""What float arithmetic alone is allowed, relative to the output."""


@dataclass(frozen=True)
class PartParity:
    """One part of a cut network against the simulation.

    Attributes:
        part: which.
        count: values compared.
        share: of its values that differs.
        largest: difference: integer steps, or for an output relative to its largest magnitude.
    """

    part: Part
    count: int
    share: float
    largest: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether that is near enough."""
        if self.part.call is None:
            return self.largest <= tolerance.output
        # One value of a few is no share: a tensor of less than 1 / share values may have one.
        return self.largest <= tolerance.steps and self.share <= max(tolerance.share, 1 / self.count)


Seen = Callable[[Tensor, Tensor], None]


@dataclass
class Whole:
    """The output that a loss would read, of the whole network against the simulation's.

    Attributes:
        count: inputs.
        largest: largest absolute difference.
        size: largest magnitude of the simulation's.
        rows: outputs that have classes; ``same`` of them have the same largest.
    """

    count: int = 0
    largest: float = 0.0
    size: float = 0.0
    rows: int = 0
    same: int = 0
    _squares: float = 0.0
    _differences: float = 0.0
    _noise: float = 0.0

    def add(self, count: int, exact: Tensor, wanted: Tensor, found: Tensor) -> None:
        """A batch of ``count`` inputs: the float network's output, the simulation's, and the file's."""
        error = wanted.double() - found.double()
        self._noise += float((wanted.double() - exact.double()).square().sum())
        self.count += count
        self.largest = max(self.largest, float(error.abs().max()))
        self.size = max(self.size, float(wanted.abs().max()))
        self._squares += float(wanted.double().square().sum())
        self._differences += float(error.square().sum())
        if has_classes(wanted):
            self.same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            self.rows += wanted[..., 0].numel()

    @property
    def relative_error(self) -> float:
        """Root of the summed squared differences over that of the squares."""
        return _root_of_ratio(self._differences, self._squares)

    @property
    def noise(self) -> float:
        """The same of the simulation's differences to the float network: what quantizing costs."""
        return _root_of_ratio(self._noise, self._squares)

    @property
    def agreement(self) -> float | None:
        """Share of equal largest outputs; None for outputs without classes."""
        return self.same / self.rows if self.rows else None

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", top-1 agreement {self.agreement:.2%}"
        return (
            f"relative error {self.relative_error:.2g} (the simulation's own to the float network: "
            f"{self.noise:.2g}){agreement}, on {self.count} inputs"
        )


def _root_of_ratio(part: float, whole: float) -> float:
    if whole == 0:
        return float("inf") if part else 0.0
    return float((part / whole) ** 0.5)


@dataclass(frozen=True)
class Parity:
    """A file against the simulation.

    Attributes:
        whole: the network end to end.
        parts: every part, fed the simulation's integers.
        part_count: inputs that these ran on.
        runtime: that ran the file.
        arithmetic: of the simulation, in words.
        distance: of the simulation to the fake-quantized one, where that is another.
    """

    whole: Whole
    parts: tuple[PartParity, ...]
    part_count: int
    runtime: str
    arithmetic: str = str(FAKE_QUANTIZED)
    distance: Whole | None = None

    def check(self, tolerance: Tolerance) -> None:
        """Refuse what is too far off.

        Raises:
            ParityError: naming the first part that differs.
        """
        bad = next(iter(self.failing(tolerance)), None)
        if bad is not None:
            unit = "steps" if bad.part.call is not None else "of the largest output"
            raise ParityError(
                f"{self.runtime} differs from the simulation at {bad.part}: by up to "
                f"{bad.largest:.3g} {unit}, {bad.share:.2%} of {bad.count} values; nothing was written"
            )
        whole, agreement = self.whole, self.whole.agreement
        apart = agreement is not None and agreement < tolerance.agreement
        if apart or not whole.relative_error <= max(tolerance.noise * whole.noise, FLOAT_NOISE):
            first = next((row.part for row in self.parts if row.share), self.parts[-1].part)
            raise ParityError(
                f"{self.runtime} differs from the simulation at the end ({whole}), although "
                "every layer alone agrees: roundings that fall the other way add up, the first of them at "
                f"{first}; nothing was written; a wider tolerance accepts it"
            )

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        whole, distance = self.whole, self.distance
        return {
            "arithmetic": self.arithmetic,
            "fake_quantized": None
            if distance is None
            else {"relative_error": distance.relative_error, "agreement": distance.agreement},
            "count": whole.count,
            "largest": whole.largest,
            "relative_error": whole.relative_error,
            "agreement": whole.agreement,
            "parts": [
                {"part": str(row.part), "count": row.count, "share": row.share, "largest": row.largest}
                for row in self.parts
            ],
            "part_count": self.part_count,
        }

    def failing(self, tolerance: Tolerance) -> list[PartParity]:
        """The parts that are too far off."""
        return [row for row in self.parts if not row.within(tolerance)]

    def worst(self) -> PartParity:
        """The part with the largest share of values that differ."""
        return max(self.parts, key=lambda row: (row.part.call is not None, row.share))


def has_classes(output: Tensor) -> bool:
    """Whether the last axis of an output is one of classes: logits, also of every token."""
    return output.ndim in (2, 3) and output.shape[-1] > 1


@dataclass
class Total:
    """Of one part, over batches."""

    count: int = 0
    differing: int = 0
    largest: float = 0.0
    size: float = 0.0

    def add(self, wanted: Array, found: Array, integers: bool) -> None:
        """A batch: what the simulation gives, what the file gives, and whether they are integers."""
        difference = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
        self.count += difference.size
        self.differing += int(np.count_nonzero(difference))
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.size = 1.0 if integers else max(self.size, float(np.abs(wanted).max(initial=0.0)))

    def result(self, part: Part) -> PartParity:
        """Of everything that was added."""
        return PartParity(
            part, self.count, self.differing / max(self.count, 1), self.largest / (self.size or 1.0)
        )
