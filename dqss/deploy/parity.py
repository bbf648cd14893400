"""Does a file give the simulation's answers? Measured in ONNX Runtime, on inputs of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from dqss.calls import call_model, first_tensor, tensors_in
from dqss.deploy.cut import Part, cut, given
from dqss.deploy.grids import Array, dtype_of
from dqss.deploy.lower import Lowered
from dqss.deploy.marks import Marked
from dqss.deploy.runtime import feeds_of, open_session, run_session
from dqss.deploy.tolerance import Tolerance
from dqss.deploy.trace import Signature, tensors_of
from dqss.errors import DataError, ParityError

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
    """

    whole: Whole
    parts: tuple[PartParity, ...]
    part_count: int

    def check(self, tolerance: Tolerance) -> None:
        """Refuse what is too far off.

        Raises:
            ParityError: naming the first part that differs.
        """
        bad = next(iter(self.failing(tolerance)), None)
        if bad is not None:
            unit = "steps" if bad.part.call is not None else "of the largest output"
            raise ParityError(
                f"onnxruntime {ort.__version__} differs from the simulation at {bad.part}: by up to "
                f"{bad.largest:.3g} {unit}, {bad.share:.2%} of {bad.count} values; nothing was written"
            )
        whole, agreement = self.whole, self.whole.agreement
        apart = agreement is not None and agreement < tolerance.agreement
        if apart or not whole.relative_error <= max(tolerance.noise * whole.noise, FLOAT_NOISE):
            first = next((row.part for row in self.parts if row.share), self.parts[-1].part)
            raise ParityError(
                f"onnxruntime {ort.__version__} differs from the simulation at the end ({whole}), although "
                "every layer alone agrees: roundings that fall the other way add up, the first of them at "
                f"{first}; nothing was written; a wider tolerance accepts it"
            )

    def failing(self, tolerance: Tolerance) -> list[PartParity]:
        """The parts that are too far off."""
        return [row for row in self.parts if not row.within(tolerance)]

    def worst(self) -> PartParity:
        """The part with the largest share of values that differ."""
        return max(self.parts, key=lambda row: (row.part.call is not None, row.share))


class Comparison:
    """A lowered graph in ONNX Runtime beside the simulation.

    Args:
        marked: runs the simulation, and keeps its codes.
        signature: names of inputs and outputs.
        threads: of the runtime.
    """

    def __init__(self, marked: Marked, signature: Signature, threads: int) -> None:
        self.marked, self.signature, self.threads = marked, signature, threads

    @torch.no_grad()
    def whole(self, data: bytes, exact: nn.Module, batches: Iterable[Any], seen: Seen | None = None) -> Whole:
        """The whole network over ``batches``; ``seen`` is called with both outputs of each.

        ``exact`` is the float network.
        """
        session, total = open_session(data, self.threads), Whole()
        for batch in batches:
            outputs = call_model(self.marked, batch)
            wanted = first_tensor(outputs)
            position = next(i for i, output in enumerate(tensors_in(outputs)) if output is wanted)
            feeds = feeds_of(self.signature.inputs, tensors_of(batch))
            found = torch.from_numpy(run_session(session, feeds)[self.signature.outputs[position]])
            reference = first_tensor(call_model(exact, batch))
            total.add(len(tensors_of(batch)[0]), reference, wanted, found)
            if seen is not None:
                seen(wanted, found)
        if total.count == 0:
            raise DataError("an export needs inputs to be compared on: give some, as the network takes them")
        return total

    @torch.no_grad()
    def parts(self, model: ir.Model, lowered: Lowered, batches: Iterable[Any]) -> list[PartParity]:
        """Every part of the network, fed the simulation's integers."""
        names = {call: str(value.name) for call, value in lowered.codes.items()}
        severed, parts = cut(model, names)
        session = open_session(ir.to_proto(severed).SerializeToString(), self.threads)
        totals = {part.output: _Total() for part in parts}
        for batch in batches:
            with self.marked.notes.keeping_codes():
                outputs = list(tensors_in(call_model(self.marked, batch)))
                codes = dict(self.marked.notes.codes or {})
            wanted: dict[str, Array] = dict(
                zip(self.signature.outputs, (x.numpy() for x in outputs), strict=True)
            )
            feeds = feeds_of(self.signature.inputs, tensors_of(batch))
            for call, name in names.items():
                held = lowered.held[call[0]]
                wanted[name] = (codes[call].numpy() + held.offset).astype(dtype_of(held.container))
                feeds[given(name)] = wanted[name]
            found = run_session(session, feeds)
            for part in parts:
                totals[part.output].add(wanted[part.output], found[part.output], part.call is not None)
        return [totals[part.output].result(part) for part in parts]


def has_classes(output: Tensor) -> bool:
    """Whether the last axis of an output is one of classes: logits, also of every token."""
    return output.ndim in (2, 3) and output.shape[-1] > 1


@dataclass
class _Total:
    count: int = 0
    differing: int = 0
    largest: float = 0.0
    size: float = 0.0

    def add(self, wanted: Array, found: Array, integers: bool) -> None:
        difference = np.abs(wanted.astype(np.float64) - found.astype(np.float64))
        self.count += difference.size
        self.differing += int(np.count_nonzero(difference))
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.size = 1.0 if integers else max(self.size, float(np.abs(wanted).max(initial=0.0)))

    def result(self, part: Part) -> PartParity:
        return PartParity(
            part, self.count, self.differing / max(self.count, 1), self.largest / (self.size or 1.0)
        )
