"""Which integer type of ONNX holds a grid, and what it does not saturate by itself.

ONNX has integers of 4, 8 and 16 bits. A grid of another width lives in the next wider one, whose
ends are then not the grid's: something has to clip. No onnx and no torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Container:
    """An integer type.

    Attributes:
        bits: its width.
        signed: two's complement, or from zero on.
    """

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        """As ONNX and numpy call it: ``"uint8"``."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def low(self) -> int:
        """Smallest value, inclusive."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest value, inclusive."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


ACTIVATION_WIDTHS = (8, 16)
"""No runtime that we know of computes with activations of four bits."""
WEIGHT_WIDTHS = (4, 8, 16)


@dataclass(frozen=True)
class Held:
    """How an integer type holds the codes of a grid: ``stored = (code + offset) << shift``.

    Real values stay what they are: the zero point moves along, and the scale is halved with each
    place of the shift, which is exact.
    """

    container: Container
    offset: int = 0
    shift: int = 0


def hold_activation(spec: QuantSpec, signed: bool) -> Held:
    """For the codes of an activation.

    Args:
        spec: the grid.
        signed: whether the runtime has kernels for signed activations; where it has none, a full grid
            moves into the unsigned type of the same width.
    """
    container = container_of(spec, ACTIVATION_WIDTHS)
    if container.signed and not signed and spec.bits == container.bits:
        return Held(Container(container.bits, signed=False), offset=-container.low)
    return Held(container)


def hold_weight(spec: QuantSpec, widths: Iterable[int]) -> Held:
    """For the codes of a weight.

    In a byte, a narrow code stands at the upper end. A runtime rounds a bias to whole units of the
    accumulator, the product of both scales: from the lower end, at four bits, these were 16 times
    coarser than the kernel allows, and near the step of what follows.
    """
    container = container_of(spec, widths)
    return Held(container, shift=8 - spec.bits if container.bits == 8 else 0)


def container_of(spec: QuantSpec, widths: Iterable[int]) -> Container:
    """The narrowest type among ``widths`` that holds every code of a grid.

    Raises:
        ValueError: where none is wide enough.
    """
    for bits in sorted(widths):
        if bits >= spec.bits:
            return Container(bits, signed=spec.qmin < 0)
    raise ValueError(f"{spec.bits} bits fit into none of {sorted(widths)}")


def unsaturated(spec: QuantSpec, held: Held) -> tuple[int | None, int | None]:
    """The ends of a grid that its integer type does not enforce by saturating: lowest and highest code.

    None for an end that both share: a code beyond it saturates there anyway.
    """
    low = None if spec.qmin + held.offset == held.container.low else spec.qmin
    high = None if spec.qmax + held.offset == held.container.high else spec.qmax
    return low, high
