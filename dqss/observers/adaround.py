"""AdaRound as a candidate: the grid of least squares, and weights rounded to fit the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dqss.observers.mse import MSE


@dataclass(frozen=True)
class AdaRound(MSE):
    """Up or down for each weight, so that the layer's output moves least (arXiv 2004.10568, eq. 14).

    The clip range is that of :class:`MSE`; :mod:`dqss.fitting` rounds, once, before the search. For
    weights only.
    """

    name: ClassVar[str] = "adaround"
    needs_inputs: ClassVar[bool] = True
