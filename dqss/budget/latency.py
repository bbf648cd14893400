"""Latency from a user's table of measurements: a row for each layer at each pair of widths."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from dqss.budget.cost import Pair, SumCost
from dqss.errors import BudgetError
from dqss.mixed import MixedQuantizer
from dqss.supernet import Supernet

COLUMNS = ("layer", "weight_bits", "activation_bits", "ms")
FLOAT = "float"
Widths = tuple[int | None, int | None]
"""Of weight and activation; None is float."""


@dataclass(frozen=True)
class Row:
    """Milliseconds of the layers whose name matches a shell pattern, at one pair of widths."""

    layer: str
    widths: Widths
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Rows, of which the first that matches a layer and its widths counts.

    Attributes:
        source: the file, for messages.
        rows: in the file's order.
    """

    source: str
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read a csv file with a header, or a YAML list of mappings, with the keys of :data:`COLUMNS`.

        Bits are numbers, or ``float`` (or empty) for tensors that stay in float.

        Raises:
            BudgetError: naming the file, the row and what was expected.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
            found = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else _csv(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
            reason = " ".join(str(error).split())[:120]
            raise BudgetError(f"budget.latency_table={file}: cannot be read ({reason})") from error
        if not isinstance(found, list) or not found:
            raise BudgetError(f"budget.latency_table={file}: expected rows with {', '.join(COLUMNS)}")
        return cls(str(file), tuple(_row(file, number, each) for number, each in enumerate(found, 1)))

    def ms(self, layer: str, widths: Widths) -> float | None:
        """What the first row that fits says; None where none does."""
        rows = (row for row in self.rows if row.widths == widths and fnmatchcase(layer, row.layer))
        return next((row.ms for row in rows), None)

    def needed(self, layer: str, widths: Widths) -> float:
        """The same for a layer under search.

        Raises:
            BudgetError: naming the row that is missing.
        """
        found = self.ms(layer, widths)
        if found is None:
            words = " and ".join(
                f"{role} of {FLOAT if bits is None else f'{bits} bits'}"
                for role, bits in zip(("weights", "activations"), widths, strict=True)
            )
            raise BudgetError(f"budget.latency_table={self.source}: no row for layer {layer!r} with {words}")
        return found


def latency(supernet: Supernet, table: LatencyTable) -> SumCost:
    """Milliseconds of all layers, one after the other.

    Layers that are left in float count where the table has a row for them; products of two
    activations do not.
    """
    single: dict[str, torch.Tensor] = {}
    pairs: list[Pair] = []
    for name, layer in supernet.layers.items():
        weight, activation = layer.weight, layer.activation
        rows = [[table.needed(name, (w, a)) for a in _widths(activation)] for w in _widths(weight)]
        values = torch.tensor(rows, dtype=torch.float64)
        if weight is not None and activation is not None:
            pairs.append(Pair(weight.decision.name, activation.decision.name, values))
        else:
            alone = weight or activation
            assert alone is not None
            known = single.get(alone.decision.name, 0.0)
            single[alone.decision.name] = values.flatten() + known
    skipped = (table.ms(name, (None, None)) for name in supernet.coverage.skipped)
    constant = sum(ms for ms in skipped if ms is not None)
    return SumCost("latency_ms", "ms", single, tuple(pairs), constant=constant)


def _widths(quantizer: MixedQuantizer | None) -> list[int | None]:
    if quantizer is None:
        return [None]
    return [quantizer[k].candidate.spec.bits for k in range(len(quantizer.candidates))]


def _csv(text: str) -> list[dict[str, Any]]:
    lines: Iterable[str] = text.splitlines()
    return list(csv.DictReader(lines, strict=True))


def _row(file: Path, number: int, given: Any) -> Row:
    if not isinstance(given, Mapping) or set(given) != set(COLUMNS):
        raise BudgetError(f"budget.latency_table={file}: row {number}: expected {', '.join(COLUMNS)}")
    try:
        ms = float(given["ms"])
        widths = (_bits(given["weight_bits"]), _bits(given["activation_bits"]))
    except (TypeError, ValueError):
        raise BudgetError(
            f"budget.latency_table={file}: row {number}: expected bits (a whole number, or {FLOAT}) and "
            "milliseconds"
        ) from None
    if not 0 <= ms < float("inf"):
        raise BudgetError(f"budget.latency_table={file}: row {number}: ms={ms}: expected 0 or more")
    return Row(str(given["layer"]), widths, ms)


def _bits(given: Any) -> int | None:
    return None if given is None or str(given).strip().lower() in ("", FLOAT) else int(given)
