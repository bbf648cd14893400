"""What an export says about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqss.deploy.compared import Parity
from dqss.deploy.runtime import Kernels
from dqss.deploy.sizes import Sizes


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what was measured before.

    Attributes:
        path: the file.
        target: name of the target.
        parity: the file against the simulation, in ONNX Runtime.
        kernels: what runs in integers there.
        sizes: of the file.
        containers: bits of a grid and name of the integer type that holds it, for weights and
            activations, counted.
        clipped: activations whose grid is narrower than its integer type, with a ``Clip`` before.
        open_axes: of each input, the axes whose size is free.
        metric: the task metric of simulation and file on the same inputs; empty without targets.
        notes: what a user should know.
    """

    path: Path
    target: str
    parity: Parity
    kernels: Kernels
    sizes: Sizes
    containers: dict[str, Counter[tuple[int, str]]]
    clipped: int
    open_axes: dict[str, tuple[int, ...]]
    metric: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people."""
        for role, found in self.containers.items():
            held = ", ".join(f"{n} of {bits} bits as {kind}" for (bits, kind), n in sorted(found.items()))
            yield f"{role}: {held or 'all in float'}"
        if self.clipped:
            yield f"{self.clipped} activations clipped to a grid narrower than their type"
        axes = [f"{name} {list(found)}" for name, found in self.open_axes.items() if found]
        yield f"axes of any size: {', '.join(axes) or 'none'}"
        yield f"kernels: {self.kernels}"
        yield f"size: {self.sizes}"
        worst = self.parity.worst()
        integer = [row for row in self.parity.parts if row.part.call is not None]
        if integer:
            steps = max(row.largest for row in integer)
            yield (
                f"layer by layer: at most {steps:.0f} steps on at most {worst.share:.2%} of the values "
                f"({worst.part}), on {self.parity.part_count} inputs"
            )
        yield f"end to end: {self.parity.whole}"
        distance = self.parity.distance
        if distance is not None:
            agreement = "" if distance.agreement is None else f", top-1 agreement {distance.agreement:.2%}"
            yield (
                f"compared with the simulation in {self.parity.arithmetic}; its own difference to the "
                f"fake-quantized one: relative error {distance.relative_error:.2g}{agreement}"
            )
        yield from self.notes

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "target": self.target,
            "bytes": self.sizes.summary(),
            "kernels": {"integer": dict(self.kernels.integer), "float": dict(self.kernels.floating)},
            "parity": self.parity.summary(),
            "metric": self.metric,
        }
