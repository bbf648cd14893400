"""The rows of results.csv as markdown: the targets, then everything."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.steps import STEPS

Key = tuple[str, str, str]
"""Part, candidates, row."""

EIGHT = "8"
BOUNDS = {
    "search step": {"resnet18": 0.95, "mobilenetv2": 1.5, "resnet20": 1.5, "vit_tiny": 1.15},
    "peak memory": dict.fromkeys(NETWORKS, 1.3),
    "2 to 16": {**dict.fromkeys(NETWORKS, 1.5), "mobilenetv2": 2.5},
    "calibration": dict.fromkeys(NETWORKS, 3.0),
    "search": {"mobilenetv2": 30.0},
    "fast": {"mobilenetv2": 10.0},
}


class Results:
    """The ratios measured on one device with one number of threads."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self.rows = rows

    def ratio(self, network: str, part: str, candidates: str, row: str) -> float | None:
        """The ratio of a row; the last one if there are several sizes of sets or searches."""
        wanted = (network, part, candidates, row)
        found = [r for r in self.rows if (r["network"], r["part"], r["candidates"], r["row"]) == wanted]
        return float(found[-1]["ratio"]) if found else None

    def growth(self, network: str) -> float | None:
        """Of a search step from 2 to 16 candidates, each against the float step beside it."""
        few, many = (self.ratio(network, "step", count, "search") for count in ("2", "16"))
        return None if few is None or many is None else many / few


def summary(path: Path) -> Iterator[str]:
    """Lines of markdown for all rows of a file."""
    if not path.exists():
        raise SystemExit(f"error: no rows yet in {path}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for device, threads in dict.fromkeys((row["device"], row["threads"]) for row in rows):
        of_it = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        yield f"**{device}, {threads} thread{'s' * (threads != '1')}**"
        yield ""
        yield from _targets(Results(of_it))
        yield ""
        yield from _everything(Results(of_it))
        yield ""


def _targets(results: Results) -> Iterator[str]:
    """What the benchmark is for, each beside its bound."""
    lines = {
        "search step": ("search step / float step, 8 candidates", ("step", EIGHT, "search")),
        "peak memory": ("its peak memory above the model's own / float step's", ("memory", EIGHT, "search")),
        "2 to 16": ("search step, 16 candidates / 2", None),
        "calibration": ("calibration / float pass, 8 candidates", ("calibration", EIGHT, "calibration")),
        "search": ("whole search / float pass, 8 candidates", ("search", EIGHT, "search")),
        "fast": ("the same with method=ptq_fast", ("search", EIGHT, "search, fast")),
    }
    yield from _head("")
    for name, (title, key) in lines.items():
        found = [results.growth(n) if key is None else results.ratio(n, *key) for n in NETWORKS]
        bounds = [BOUNDS[name].get(n) for n in NETWORKS]
        yield _line(title, [_beside(*pair) for pair in zip(found, bounds, strict=True)])


def _everything(results: Results) -> Iterator[str]:
    yield from _head("part, candidates, row")
    for part, count, row in sorted(_keys(results), key=_order):
        found = [results.ratio(network, part, count, row) for network in NETWORKS]
        yield _line(f"{part}, {count}, {row}", [_number(value) for value in found])


def _keys(results: Results) -> list[Key]:
    return list(dict.fromkeys((r["part"], r["candidates"], r["row"]) for r in results.rows))


def _order(key: Key) -> tuple[str, int, int]:
    part, count, row = key
    return part, int(count), STEPS.index(row) if row in STEPS else 0


def _head(first: str) -> Iterator[str]:
    yield _line(first, [network.title for network in NETWORKS.values()])
    yield "|" + "---|" * (1 + len(NETWORKS))


def _line(first: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


def _beside(value: float | None, bound: float | None) -> str:
    return _number(value) + ("" if bound is None else f" (<= {bound:g})")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "out of memory" if value != value else f"{value:.3g}"
