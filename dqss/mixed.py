"""A tensor's candidates and the decision that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from dqss import quantizers
from dqss.decision import Decision
from dqss.functional import channel_count, channel_view
from dqss.mixing import CodeStack, mix_codes, mix_fake_quantize
from dqss.observers import Statistics
from dqss.observers.histogram import HistogramAccumulator
from dqss.precision import keeping_dtype
from dqss.spec import Candidate, Granularity


class Mode(Enum):
    """What every quantizer of a supernet does in its forward pass."""

    FLOAT = "float"
    OBSERVE = "observe"
    RELAXED = "relaxed"
    DISCRETE = "discrete"


class MixedQuantizer(nn.Module):
    """Runs the mixture, or the choice, of a decision's candidates on one tensor.

    Args:
        candidates: the options of ``decision``, in its order.
        decision: may be shared with other quantizers.
        shape: of the tensor without its batch (for counting channels): the weight's shape, or
            for activations any shape whose channel axes are right.
    """

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__()
        self.decision = decision
        self.candidates = nn.ModuleList(
            quantizers.build(c, channel_count(shape, c.spec.granularity)) for c in candidates
        )
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

    def calibrate(self, stats: dict[Granularity, Statistics]) -> None:
        """Calibrate every candidate from the statistics of its granularity."""
        for k in range(len(self.candidates)):
            self[k].calibrate(stats[self[k].candidate.spec.granularity])


class MixedActivation(MixedQuantizer):
    """Mixture of quantizations of a layer's input; observes it while calibrating."""

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__(candidates, decision, shape)
        self._observed: dict[Granularity, HistogramAccumulator] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` as the mode says; integers pass through."""
        self.calls += 1
        if self.mode is Mode.FLOAT or not x.is_floating_point():
            return x
        if self.mode is Mode.OBSERVE:
            self._observe(x)
            return x
        if self.mode is Mode.DISCRETE:
            found: Tensor = self[self.decision.choice](x)
            return found
        grids = [self[k].grid(x.ndim) for k in range(len(self.candidates))]
        return mix_fake_quantize(x, self.decision.weights(), grids)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        for granularity in self.granularities:
            rows = channel_view(x, granularity)
            if granularity not in self._observed:
                self._observed[granularity] = HistogramAccumulator(rows.shape[0])
            self._observed[granularity].update(rows)

    @property
    def observed(self) -> bool:
        """Whether any floating-point input was seen while calibrating."""
        return bool(self._observed)

    def finish_calibration(self) -> None:
        """Turn what was observed into parameters, and forget it."""
        self.calibrate({key: histogram.statistics() for key, histogram in self._observed.items()})
        self._observed = {}


class MixedWeight(MixedQuantizer):
    """Mixture of quantizations of a frozen weight; used as its parametrization.

    Each candidate is quantized once and kept as integer codes (K bytes a weight).
    """

    def __init__(self, candidates: Sequence[Candidate], decision: Decision, shape: torch.Size) -> None:
        super().__init__(candidates, decision, shape)
        self._stack: CodeStack | None = None

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Calibrate on ``weight`` itself and keep its codes."""
        views = {g: channel_view(weight, g) for g in self.granularities}
        self.calibrate({granularity: Statistics.of(rows) for granularity, rows in views.items()})
        self._stack = CodeStack.of([self[k].codes(weight) for k in range(len(self.candidates))])

    @property
    def stack(self) -> CodeStack:
        """The codes of all candidates, once frozen."""
        if self._stack is None:
            raise RuntimeError(f"{self.decision.name} is not calibrated yet")
        return self._stack

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
        self.calls += 1
        if self.mode is Mode.FLOAT or self.mode is Mode.OBSERVE:
            return weight
        if self.mode is Mode.DISCRETE:
            return self.stack.choose(self.decision.choice).to(weight.dtype)
        return mix_codes(self.decision.weights(), self.stack).to(weight.dtype)
