"""Study: which families of networks can be searched, and what of them stays in float? See README.md here.

    python experiments/families/run.py

Every model of models.txt gets a row in results.csv, in the order of that list; models that have
one are not run again, unless --again names them. Each runs in a process of its own. With --products
the products of two activations are searched too, and rows go to products.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqss import PTQSettings, UserError, apply_strategy, load, search_ptq
from dqss.attach import original_weight
from dqss.calls import tensors_in
from dqss.discretize import RefineSettings
from dqss.lit.search import SearchResult
from dqss.search_spaces import uniform

HERE = Path(__file__).parent
IMAGES, BATCH = 5, 2
ALGORITHMS = ("minmax", "mse"), ("minmax", {"name": "percentile", "p": 99.9})
SETTINGS = PTQSettings(
    steps=2, batch_size=BATCH, refine=RefineSettings(passes=8, alternatives=1), finalists=1, discrete_every=0
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "lstm", "mkldnn_rnn_layer")
NATIVE = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


@dataclass(frozen=True)
class Entry:
    """A line of models.txt."""

    source: str
    family: str
    model: str
    size: int
    arguments: dict[str, int]

    @classmethod
    def parse(cls, line: str) -> Entry:
        """``source family model size key=value ...``."""
        source, family, model, size, *pairs = line.split()
        return cls(source, family, model, int(size), {k: int(v) for k, v in (p.split("=") for p in pairs)})

    @property
    def key(self) -> tuple[str, str]:
        """What identifies a row."""
        return self.source, self.model


@dataclass
class Row:
    """A line of results.csv.

    Attributes:
        searched: convolutions and linear layers whose weight was searched.
        weight_only: those of them whose input stays in float, because their forward is never called.
        unused: layers that no input reaches.
        other_weights: weights that are multiplied but belong to no such layer; they stay in float.
        prepare: the recipe of the canonical float network, without the names of what it left.
        applied_equals_simulated: all outputs of the applied bundle and of the supernet, bit for bit.
        float_error: largest difference of the canonical to the original network, relative.
        quantized_error: the same for the quantized network; zero would make the comparison empty.
        status: pass, differs, refused (with a reason in the user's words), crashed or timeout.
        products, hidden_products: products of two activations that are searched, and those that
            cannot be; only counted where they are searched.
    """

    source: str
    family: str
    model: str
    input: int
    status: str = "crashed"
    searched: int = 0
    weight_only: int = 0
    unused: int = 0
    other_weights: int = 0
    prepare: str = ""
    applied_equals_simulated: bool = False
    float_error: float = 0.0
    quantized_error: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    products: int = 0
    hidden_products: int = 0


COLUMNS = [field.name for field in fields(Row)]


def read_entries(path: Path) -> list[Entry]:
    """All lines that are not comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Entry.parse(line) for line in lines if line]


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by source and model; none where the file is missing."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["source"], row["model"]): row for row in csv.DictReader(file)}


def write_rows(
    path: Path, entries: Sequence[Entry], rows: dict[tuple[str, str], dict[str, Any]], products: bool
) -> None:
    """All rows in the order of the list."""
    columns = [name for name in COLUMNS if products or not name.endswith("products")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[entry.key] for entry in entries if entry.key in rows)


def make_model(entry: Entry, seed: int = 0) -> nn.Module:
    """Random weights under which nothing is trivial: no norm an identity, no branch switched off.

    Batch norms hold the statistics of a batch of noise, a little off. Parameters that are
    initialized to a constant (scales of residual branches and of norms, zeroed heads) are drawn.
    """
    torch.manual_seed(seed)
    if entry.source == "timm":
        model: nn.Module = importlib.import_module("timm").create_model(entry.model, **entry.arguments)
    else:
        model = importlib.import_module("torchvision").models.get_model(entry.model, **entry.arguments)
    with torch.no_grad():
        _draw_constants(model)
        _observe_norms(model, torch.randn(4, 3, entry.size, entry.size))
    return model.eval()


def _draw_constants(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            start = float(parameter.flatten()[0])
            middle = start if parameter.ndim < 2 and abs(start) > 0.1 else 0.0
            spread = 0.02 if parameter.ndim > 1 else 0.2
            parameter.copy_(middle + spread * torch.randn(parameter.shape))


def _observe_norms(model: nn.Module, images: Tensor) -> None:
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features))
            norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.8, 1.25)).add_(1e-3)


class _Multiplied(TorchDispatchMode):
    """Notes which of ``weights`` (names by address) some product reads."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in (*PRODUCTS, *NATIVE):
            for tensor in tensors_in([args, kwargs or {}]):
                name = self.weights.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    self.found.add(name)
        return func(*args, **(kwargs or {}))


def other_weights(result: SearchResult, images: Tensor) -> list[str]:
    """Parameters of two or more axes that are multiplied in float, whatever module holds them."""
    supernet = result.supernet
    layers = [layer for layer in supernet.layers.values() if layer.weight is not None]
    searched = {original_weight(layer.module).untyped_storage().data_ptr() for layer in layers}
    rest = {
        p.untyped_storage().data_ptr(): name
        for name, p in supernet.model.named_parameters()
        if p.ndim > 1 and p.untyped_storage().data_ptr() not in searched
    }
    with torch.no_grad(), supernet.mode("float"), _Multiplied(rest) as multiplied:
        supernet(images)
    return sorted(multiplied.found)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [t for batch in images.split(BATCH) for t in tensors_in(model(batch.clone()))]


def _error(reference: list[Tensor], found: list[Tensor]) -> float:
    """Largest absolute difference over the largest absolute value."""
    pairs = zip(reference, found, strict=True)
    return float(f"{max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs):.2g}")


def fill(row: Row, entry: Entry, products: bool) -> None:
    """Search, save, apply, compare."""
    model = make_model(entry)
    space = uniform(4, 8, *ALGORITHMS, products=products)
    images = torch.randn(IMAGES, 3, entry.size, entry.size, generator=torch.Generator().manual_seed(1))
    result = search_ptq(model, images, space, SETTINGS, trainer={"accelerator": "cpu"})
    supernet, coverage = result.supernet, result.supernet.coverage
    row.searched = sum(layer.weight is not None for layer in supernet.layers.values())
    row.weight_only, row.unused = len(coverage.weight_only), len(coverage.unused)
    row.products, row.hidden_products = len(supernet.products), len(coverage.hidden_products)
    row.prepare = " ".join(step.split(" ")[0] for step in result.bundle.strategy.model.prepare)
    others = other_weights(result, images[:BATCH])
    row.other_weights = len(others)
    row.reason = f"in float: {', '.join(others[:2])}" + (" ..." if len(others) > 2 else "") if others else ""
    with tempfile.TemporaryDirectory() as folder:
        result.bundle.save(folder)
        applied = apply_strategy(model, load(folder))
    exported = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad():
        original, found = _outputs(model, images), _outputs(applied, images)
        with supernet.mode("float"):
            row.float_error = _error(original, _outputs(supernet, images))
        with supernet.assign(exported):
            simulated = _outputs(supernet, images)
    row.quantized_error = _error(original, simulated)
    equal = len(found) == len(simulated) and all(map(torch.equal, found, simulated))
    row.applied_equals_simulated = equal
    row.status = "pass" if equal and row.quantized_error > 0 else "differs"


def study(entry: Entry, products: bool) -> Row:
    """The row of one model; never raises."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    row, started = Row(entry.source, entry.family, entry.model, entry.size), time.perf_counter()
    try:
        fill(row, entry, products)
    except UserError as error:
        row.status, row.reason = "refused", str(error)
    except Exception as error:
        traceback.print_exc()
        row.reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _send(entry: Entry, products: bool, pipe: Any) -> None:
    pipe.send(study(entry, products))


def alone(entry: Entry, products: bool, limit: float) -> Row:
    """The row of one model, from a process that may take ``limit`` seconds and may crash."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dqss.lit.search", "timm", "torchvision"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(entry, products, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            row: Row = ours.recv()
            process.join(limit)
            return row
        reason = Row(entry.source, entry.family, entry.model, entry.size, status="timeout", seconds=limit)
        reason.reason = f"more than {limit:g} s"
        return reason
    except EOFError:
        return Row(entry.source, entry.family, entry.model, entry.size, reason="the process died")
    finally:
        process.kill()
        process.join()


def wanted(entries: Sequence[Entry], names: Sequence[str]) -> Iterator[Entry]:
    """The named entries, all without names."""
    unknown = set(names) - {entry.model for entry in entries}
    if unknown:
        raise SystemExit(f"error: not in models.txt: {', '.join(sorted(unknown))}")
    return (entry for entry in entries if not names or entry.model in names)


def main() -> None:
    """Fill in the missing rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="only these (default: all of models.txt)")
    parser.add_argument("--again", action="store_true", help="also where there is a row")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a model")
    parser.add_argument("--products", action="store_true", help="search products of two activations too")
    parser.add_argument("--results", type=Path, help="default: results.csv or products.csv here")
    options = parser.parse_args()
    path = options.results or HERE / ("products.csv" if options.products else "results.csv")
    entries, rows = read_entries(HERE / "models.txt"), read_rows(path)
    for entry in wanted(entries, options.models):
        if entry.key in rows and not options.again:
            continue
        row = alone(entry, options.products, options.limit)
        rows[entry.key] = {name: getattr(row, name) for name in COLUMNS}
        write_rows(path, entries, rows, options.products)
        print(f"{row.source} {row.model}: {row.status} {row.seconds} s {row.reason}", flush=True)


if __name__ == "__main__":
    main()
