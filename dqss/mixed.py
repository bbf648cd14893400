"""A tensor's candidates and the decision that chooses among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from dqss import quantizers
from dqss.decision import Decision
from dqss.fitting import Moments, fit_rounding
from dqss.functional import channel_count, channel_view
from dqss.fused import no_modes
from dqss.mixing import Codes, CodeStack, GridStack, mix_codes, mix_fake_quantize
from dqss.observers import Statistics
from dqss.observers.coarse import CoarseHistogram
from dqss.observers.histogram import HistogramAccumulator
from dqss.precision import in_dtype, keeping_dtype
from dqss.spec import Candidate, Granularity, Role


class Mode(Enum):
    """What every quantizer of a supernet does in its forward pass.

    ``OBSERVE`` and ``PROBE`` are for calibration: the network runs in float; the former collects
    values, the latter, on the way back, the squared gradients with which errors are weighed.
    """

    FLOAT = "float"
    OBSERVE = "observe"
    PROBE = "probe"
    RELAXED = "relaxed"
    DISCRETE = "discrete"


@dataclass(frozen=True)
class Found:
    """What a quantizer is calibrated with.

    Attributes:
        stats: statistics of its tensor at each granularity of its candidates.
        weight: the tensor itself, where it is a weight.
    """

    stats: dict[Granularity, Statistics]
    weight: Tensor | None = None

    @property
    def size(self) -> int:
        """Values in it."""
        return sum(stats.values.numel() for stats in self.stats.values())


class MixedQuantizer(nn.Module, ABC):
    """Runs the mixture, or the choice, of a decision's candidates on one tensor.

    Args:
        candidates: the options of ``decision``, in its order.
        decision: may be shared with other quantizers.
        shape: of the tensor without its batch (for counting channels): the weight's shape, or
            for activations any shape whose channel axes are right.
    """

    role: ClassVar[Role]

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__()
        self.decision = decision
        self.candidates = nn.ModuleList(
            quantizers.build(c, channel_count(shape, c.spec.granularity), self.role) for c in candidates
        )
        self.needs_gradients = any(self[k].needs_gradients for k in range(len(candidates)))
        self.needs_inputs = any(self[k].needs_inputs for k in range(len(candidates)))
        self.mode = Mode.FLOAT
        self.calls = 0

    def __getitem__(self, index: int) -> quantizers.Quantizer:
        """The candidate's quantizer."""
        found = self.candidates[index]
        assert isinstance(found, quantizers.Quantizer)
        return found

    @property
    def granularities(self) -> list[Granularity]:
        """The distinct granularities of the candidates, in order."""
        return list(dict.fromkeys(self[k].candidate.spec.granularity for k in range(len(self.candidates))))

    def switch(self, mode: Mode) -> None:
        """Set :attr:`mode`, and not by the way of modules, which looks for parameters first."""
        self.__dict__["mode"] = mode

    @property
    def idle(self) -> bool:
        """Whether it only hands on what it is given."""
        return self.mode is Mode.FLOAT

    @property
    def alone(self) -> bool:
        """Whether the choice is used by itself: no other candidate counts, and none has a gradient."""
        return self.mode is Mode.DISCRETE or self.decision.frozen

    @abstractmethod
    def outcome(self) -> list[int]:
        """For each candidate the first that, once calibrated, gives the same to the bit, whatever comes."""

    @abstractmethod
    def settle(self, found: Found) -> None:
        """Keep what a calibrated quantizer needs, and forget what it was calibrated with."""


class Bypass(Protocol):
    """A layer that quantizes its input itself where it can; see :mod:`dqss.integers`."""

    def applies(self, x: Tensor) -> bool:
        """Whether it does so with ``x``."""


class MixedActivation(MixedQuantizer):
    """Mixture of quantizations of a layer's input; observes it while calibrating."""

    role = Role.ACTIVATION
    bypass: Bypass | None = None
    """What leaves nothing to do here, wherever it applies."""

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__(candidates, decision, shape)
        self._observed: dict[Granularity, HistogramAccumulator] = {}
        self.histogram: CoarseHistogram | None = None
        self._stack: GridStack | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` as the mode says; integers pass through."""
        self.__dict__["calls"] += 1
        if self.mode is Mode.FLOAT or not x.is_floating_point():
            return x
        if self.mode is Mode.OBSERVE:
            self._observe(x)
            return x
        if self.mode is Mode.PROBE:
            return self._probe(x)
        if self.alone:
            found: Tensor = self[self.decision.choice](x)
            return found
        if self.bypass is not None and self.bypass.applies(x):
            return x
        weights, place = self.decision.mixture()
        return mix_fake_quantize(x, weights, self.grids(x.shape), place)

    def grids(self, shape: torch.Size) -> GridStack:
        """All grids, stacked once: after calibration they stay as they are."""
        if self._stack is None or not self._stack.fits(shape):
            grids = [self[k].grid() for k in range(len(self.candidates))]
            self._stack = GridStack.of(grids, shape, self.outcome())
        return self._stack

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedActivation:
        """Forget the stack when the module moves to another device."""
        self._stack = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        with no_modes():  # who watches the network need not watch this
            for granularity in self.granularities:
                rows = channel_view(x, granularity)
                if granularity not in self._observed:
                    keep = any(self[k].needs_batches for k in range(len(self.candidates)))
                    self._observed[granularity] = HistogramAccumulator(rows.shape[0], keep_batches=keep)
                self._observed[granularity].update(rows)

    def _probe(self, x: Tensor) -> Tensor:
        """``x`` itself, in a place of its own, where its gradient is weighed on the way back."""
        if not self.needs_gradients or not self.observed:
            return x
        # A copy: other readers of x have gradients of their own, and may write into it.
        x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        values = x.detach()
        x.register_hook(lambda gradient: self._weigh(values, gradient))  # type: ignore[no-untyped-call]
        return x

    def _weigh(self, values: Tensor, gradient: Tensor) -> None:
        for granularity, histogram in self._observed.items():
            histogram.weigh(channel_view(values, granularity), channel_view(squared(gradient), granularity))

    @property
    def observed(self) -> bool:
        """Whether any floating-point input was seen while calibrating."""
        return bool(self._observed)

    def outcome(self) -> list[int]:
        """See :meth:`MixedQuantizer.outcome`: of the same grid."""
        grids = (self[k].grid() for k in range(len(self.candidates)))
        return _first_equal((grid.spec, _bytes(grid.scale), _bytes(grid.zero_point)) for grid in grids)

    def found(self) -> Found:
        """What was observed."""
        return Found({key: histogram.statistics() for key, histogram in self._observed.items()})

    def settle(self, found: Found) -> None:
        """See :meth:`MixedQuantizer.settle`: a coarse picture is left of what was observed."""
        self._stack = None
        self.histogram = CoarseHistogram.of(min(found.stats.values(), key=lambda one: one.values.numel()))
        self._observed = {}


class MixedWeight(MixedQuantizer):
    """Mixture of quantizations of a frozen weight; used as its parametrization.

    Each candidate is quantized once and kept as integer codes (K bytes a weight).
    """

    role = Role.WEIGHT

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__(candidates, decision, shape)
        self._stack: CodeStack | None = None
        self.moments: Moments | None = None
        self._fitted = False
        self._probed: Tensor | None = None
        self._importance: Tensor | None = None

    @torch.no_grad()
    def found(self, weight: Tensor) -> Found:
        """``weight`` itself, weighted by the gradients collected."""
        return Found({g: self._statistics(weight, g) for g in self.granularities}, weight)

    @torch.no_grad()
    def settle(self, found: Found) -> None:
        """See :meth:`MixedQuantizer.settle`: the codes of all candidates are kept."""
        weight = found.weight
        assert weight is not None
        moments = None if self.moments is None else self.moments.mean()
        self.moments, self._fitted = None, moments is not None
        stack = CodeStack.of([self._codes(k, weight, moments) for k in range(len(self.candidates))])
        values = (stack.choose(k) for k in range(len(self.candidates)))
        self._stack = stack.merged(_first_equal(_bytes(value) for value in values))
        self._importance = None

    def _codes(self, index: int, weight: Tensor, moments: Tensor | None) -> Codes:
        quantizer = self[index]
        if moments is None or not quantizer.needs_inputs:
            return quantizer.codes(weight)
        return fit_rounding(weight, quantizer.grid(), moments.to(weight.device))

    def fitted_codes(self, index: int) -> Tensor | None:
        """The integers of a candidate in the weight's shape, if they are not those of the nearest values."""
        if not (self._fitted and self[index].needs_inputs):
            return None
        stack, grid = self.stack, self[index].grid()
        steps = stack.restore(stack.steps[stack.distinct.rows[index]].to(torch.float32))
        return Codes.from_integers(steps + grid.shaped(stack.shape)[1], grid).integers

    def _statistics(self, weight: Tensor, granularity: Granularity) -> Statistics:
        rows = channel_view(weight, granularity)
        filled = rows.numel() > weight.numel()
        counts = channel_view(torch.ones_like(weight), granularity, fill=0) if filled else None
        importance = self._importance
        if importance is not None:
            importance = channel_view(importance, granularity, fill=0)
        return Statistics.of(rows, counts, importance)

    def collect(self) -> None:
        """Add the squared gradient of one probe (see :data:`Mode.PROBE`) to what is known of the weight."""
        gradient = None if self._probed is None else self._probed.grad
        self._probed = None
        if gradient is not None:
            square = squared(gradient)
            self._importance = square if self._importance is None else self._importance + square

    @property
    def stack(self) -> CodeStack:
        """The codes of all candidates, once frozen."""
        if self._stack is None:
            raise RuntimeError(f"{self.decision.name} is not calibrated yet")
        return self._stack

    def outcome(self) -> list[int]:
        """See :meth:`MixedQuantizer.outcome`: of the same weights, from whatever grids."""
        rows = self.stack.distinct
        return [rows.first[row] for row in rows.rows]

    @property
    def bytes(self) -> int:
        """Memory that the integer codes of all candidates take."""
        return self.stack.steps.numel() * self.stack.steps.element_size()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedWeight:
        """Take the codes along when the module moves to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stack = None if self._stack is None else self._stack.to(keeping_dtype(fn))
        return self

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer multiplies with, as the mode says."""
        self.__dict__["calls"] += 1
        if self.mode is Mode.FLOAT or self.mode is Mode.OBSERVE:
            return weight
        if self.mode is Mode.PROBE:
            return self._probe(weight)
        if self.alone:
            return in_dtype(self.stack.choose(self.decision.choice), weight.dtype)
        weights, place = self.decision.mixture()
        return in_dtype(mix_codes(weights, self.stack, place), weight.dtype)

    def _probe(self, weight: Tensor) -> Tensor:
        """``weight`` as a leaf of its own; the same one for all that read it for one output."""
        if not self.needs_gradients:
            return weight
        if self._probed is None:
            self._probed = weight.detach().clone().requires_grad_()
        return self._probed


_HELD = 1 << 22
"""Values of statistics that are held at a time at most, but for those of one tensor alone."""


def calibrate_all(several: Iterable[tuple[MixedQuantizer, Found]]) -> None:
    """Calibrate every candidate of several quantizers, what is small and alike at once."""
    held: list[tuple[MixedQuantizer, Found]] = []
    size = 0
    for quantizer, found in several:
        if held and size + found.size > _HELD:
            _calibrate_held(held)
            held, size = [], 0
        held.append((quantizer, found))
        size += found.size
    _calibrate_held(held)


def _calibrate_held(held: Sequence[tuple[MixedQuantizer, Found]]) -> None:
    quantizers.calibrate_all(
        (quantizer[k], found.stats[quantizer[k].candidate.spec.granularity])
        for quantizer, found in held
        for k in range(len(quantizer.candidates))
    )
    for quantizer, found in held:
        quantizer.settle(found)


def _first_equal(keys: Iterable[Hashable]) -> list[int]:
    """For each key the position of the first that is equal."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, k) for k, key in enumerate(keys)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def squared(gradient: Tensor) -> Tensor:
    """Squares as fp64; what is not a number (where no derivative exists) says nothing: zero."""
    return torch.nan_to_num(gradient.detach().double(), nan=0.0, posinf=0.0, neginf=0.0).square()
