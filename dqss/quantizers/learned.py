"""What quantizers that learn have in common: their parameters, their bounds, their integer codes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dqss.learning import apply_formula
from dqss.mixing import Codes, Grid
from dqss.observers import Statistics
from dqss.quantizers.base import Quantizer
from dqss.spec import Candidate, PerGroup, QuantSpec, Role

_SMALLEST = 2.0**-100  # its reciprocal, and that of its floor, are ordinary numbers

LEAST = 2.0**-10
"""No scale or clip falls below this share of where calibration put it."""


class LearnedQuantizer(Quantizer):
    """A candidate whose parameters are trained with the network.

    Subclasses set ``name``, build their ``formula`` and parameters in ``__init__`` (after calling
    this one's) and say by :meth:`refusal` which tensors and grids they are for.

    Attributes:
        name: what candidates call it.
        shifts: see :class:`dqss.observers.Algorithm`.
        defaults: its parameters (as in ``Candidate.params``) and their values where nothing is said.
        params: their values here.
        role: what the tensor is to its layer.
        floor: ``[C]`` fp32, least value of the scale or clip; set by calibration.
    """

    name: ClassVar[str]
    shifts: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, float]] = {}
    floor: Tensor

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels)
        self.role = role
        self.params = {**self.defaults, **candidate.kwargs}
        self.register_buffer("floor", torch.full((channels,), torch.finfo(torch.float32).tiny))

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """Why it cannot quantize such a tensor, and the way out; None where it can."""
        if isinstance(spec.granularity, PerGroup):
            return "learns no scales of groups: use the granularity tensor or channel"
        return None

    def parameter(self) -> nn.Parameter:
        """A new parameter of final shape."""
        return nn.Parameter(torch.ones(self.channels))

    @torch.no_grad()
    def calibrate(self, stats: Statistics) -> None:
        """See :meth:`Quantizer.calibrate`: the initialization of the paper."""
        self.start(stats.within(self.candidate.spec))

    @abstractmethod
    def start(self, stats: Statistics) -> None:
        """Set parameters and ``floor`` from statistics within the grid."""

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.forward`; differentiable in all that learns."""
        return apply_formula(x, self)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """See :meth:`Quantizer.codes`: what :meth:`forward` gives, as integers."""
        found = self.grid()
        grid = Grid(found.scale.clone(), found.zero_point.clone(), found.spec)
        scale, zero_point = grid.shaped(weight.shape)
        # Values are on the grid up to the last bit: whatever came before them, this finds their code.
        integers = torch.round(self(weight.detach().to(torch.float32)) / scale + zero_point)
        return Codes.from_integers(integers.clamp(grid.spec.qmin, grid.spec.qmax), grid)

    @abstractmethod
    def constrain_(self) -> None:
        """Bring the parameters back into their bounds; after every step of an optimizer."""

    def broken(self) -> bool:
        """Whether a parameter is NaN or infinite."""
        return not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters())


def usable(value: Tensor) -> Tensor:
    """Initial scales or clips as fp32, with 1 for those that say nothing: zero, or not finite."""
    value = value.to(torch.float32)
    return torch.where(torch.isfinite(value) & (value > _SMALLEST), value, 1.0)
