"""How far a file may be from the simulation. No onnx and no torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from the simulation.

    Attributes:
        steps: of a quantized activation that is computed from the simulation's own integers: its
            largest difference, in integer steps.
        share: of its values that may differ at all.
        output: largest difference of an output that is computed from the simulation's own integers,
            over the largest magnitude of that output.
        noise: error of the whole network to the simulation, over the simulation's own error to the
            float network. One value that rounds the other way is another input to all later layers,
            and what began as a rounding of float arithmetic grows until the roundings of both
            networks fall independently: sqrt(2) times the noise of one. More than that is a fault.
        agreement: share of the inputs for which the whole network has the same largest output; for
            outputs that have classes. Not asked for by default, for the same reason.
    """

    steps: int = 1
    share: float = 0.003
    output: float = 1e-3
    noise: float = 2.0
    agreement: float = 0.0


DEFAULT = Tolerance()
"""What a file is held to unless told otherwise."""
