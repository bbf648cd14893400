"""How many bytes quantized weights take at rest. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from dqss.spec import MAX_BITS, MIN_BITS, QuantSpec

BYTE = 8
SCALE_BITS = 32


@dataclass(frozen=True)
class Packing:
    """Into what weights are put.

    Attributes:
        widths: bits of the integer types at hand; a code takes the narrowest that holds it.
        explicit_zeros: from how many bits on a type comes with zero points even where all are zero.
    """

    widths: tuple[int, ...]
    explicit_zeros: int = MAX_BITS + 1

    def width(self, spec: QuantSpec) -> int:
        """Bits that one code takes.

        Raises:
            ValueError: where no type is wide enough.
        """
        fitting = [width for width in self.widths if width >= spec.bits]
        if not fitting:
            raise ValueError(f"{spec.bits} bits fit into none of {sorted(self.widths)}")
        return min(fitting)

    def bits_of(self, spec: QuantSpec, values: int, scales: int, shifted: bool) -> int:
        """Bits of a tensor of ``values`` codes, each of its parts in whole bytes.

        Args:
            spec: the grid.
            values: how many codes.
            scales: how many scales of four bytes, and zero points if there are any.
            shifted: whether some zero point is not zero.
        """
        width = self.width(spec)
        zeros = scales if shifted or width >= self.explicit_zeros else 0
        return _whole_bytes(values * width) + scales * SCALE_BITS + _whole_bytes(zeros * width)


def _whole_bytes(bits: int) -> int:
    return -(-bits // BYTE) * BYTE


PACKED = Packing(tuple(range(MIN_BITS, MAX_BITS + 1)))
"""Every code at its own width: what the strategy needs, whoever stores it."""


def exported(widths: tuple[int, ...]) -> Packing:
    """What :func:`dqss.export_model` stores where a target has these integer types."""
    return Packing(tuple(widths), explicit_zeros=8)


EXPORTED = exported((4, 8, 16))
"""In the integer types of ONNX: two to four bits take four, five to eight take a byte."""
