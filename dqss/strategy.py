"""What a search decided, as versioned and validated JSON: names and numbers, no tensors, no code.

A strategy names choices and leads nowhere: reading one opens no other file and imports nothing.
No torch here.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import Field, ValidationError

from dqss.choice import (
    UNION_TAGS,
    FreeJson,
    LayerStrategy,
    PerChannelField,
    PerGroupField,
    PointStrategy,
    ProductStrategy,
    Sha256,
    StrictModel,
    TensorChoice,
)
from dqss.errors import StrategyError, near_match
from dqss.io import StrPath, finite_json, json_text

SCHEMA_VERSION: Final = 1
STRATEGY_FILE = "strategy.json"

_WAY_OUT = "the file is damaged or was edited: restore it or search again"


def utc_now() -> str:
    """The present time as ``created`` holds it: ISO 8601, UTC, whole seconds."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class ModelInfo(StrictModel):
    """Which network a strategy is for.

    Attributes:
        source, name: where the network came from and what it is called there.
        weights_sha256: hash of the original state dict.
        tensors: short fingerprint of every tensor of the original state dict, so that a
            refusal can say which layers differ.
        prepare: the recipe that made the canonical float network, step by step.
        input: what the inputs were (size, mean, ...), if known.
    """

    source: str
    name: str
    weights_sha256: str
    tensors: dict[str, str]
    prepare: list[str]
    input: FreeJson = Field(default={})


class Strategy(StrictModel):
    """The result of a search: one choice for every decision, and where it came from.

    Attributes:
        tensors_sha256: hash of the tensors file that belongs to it; None before it was written.
        layers: choices by layer name, in the network's order. Names are arbitrary strings.
        products: choices for the operands of products of two activations, by names such as
            ``blocks.0.attn.product1``: the second product in the forward of ``blocks.0.attn``.
        points: choices for tensors that no layer reads, where a target needs them quantized, by names
            such as ``layer1.0.point0``: the first addition, concatenation or average in the forward of
            ``layer1.0``; a layer whose output is quantized goes by its own name.
        blocks: reserved for choices that concern more than one layer.
        ties: groups that chose as one: of layers with one weight, and of tensors (``conv1.weight``).
        repair: what was tuned after the search and with what settings; None where nothing was.
        metrics: measured values; infinite and NaN numbers become null.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    dqss: str
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    model: ModelInfo
    search_space: str
    method: str
    seed: int
    budget: FreeJson | None
    tensors_sha256: Sha256 | None = None
    layers: dict[str, LayerStrategy]
    products: dict[str, ProductStrategy] = Field(default={})
    points: dict[str, PointStrategy] = Field(default={})
    blocks: FreeJson = Field(default={})
    ties: list[list[str]] = Field(default=[])
    repair: FreeJson | None = None
    metrics: FreeJson = Field(default={})

    def choices(self) -> Iterator[tuple[str, str, TensorChoice]]:
        """Every tensor that is quantized: name of the layer, product or point, role, choice.

        Roles are ``weight`` and ``activation``, for products and points the names of their operands
        (of a layer's output: ``output``).
        """
        for layer, pair in self.layers.items():
            if pair.weight is not None:
                yield layer, "weight", pair.weight
            if pair.activation is not None:
                yield layer, "activation", pair.activation
        for several in (self.products, self.points):
            for name, strategy in several.items():
                for operand, choice in strategy.operands.items():
                    yield name, operand, choice

    def with_metrics(self, metrics: dict[str, Any]) -> Strategy:
        """The same with other measured values."""
        return self.model_copy(update={"metrics": finite_json(metrics)})

    def to_json(self) -> str:
        """Indented JSON, the same bytes for the same strategy; reads back equal."""
        return json_text(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """As it is written: what few strategies have is left out where there is none of it."""
        return self.model_dump(exclude=None if self.points else {"points"})

    @classmethod
    def parse(cls, text: str, source: str = STRATEGY_FILE) -> Strategy:
        """Read and validate what :meth:`to_json` wrote.

        Raises:
            StrategyError: one line that names ``source``, the field and what was expected.
        """
        try:
            data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
            _check_version(data, source)
            return cls.model_validate(data)
        except ValidationError as error:
            raise _refusal(source, _first_fault(error)) from error
        except json.JSONDecodeError as error:
            where = f"no valid JSON at line {error.lineno} column {error.colno} ({error.msg})"
            raise _refusal(source, where) from error
        except ValueError as error:
            raise _refusal(source, f"no valid JSON ({error})") from error
        except RecursionError as error:
            raise _refusal(source, "nested too deeply") from error

    @classmethod
    def load(cls, path: StrPath) -> Strategy:
        """Read a run folder's strategy, or a strategy file.

        Raises:
            StrategyError: where there is none, or as :meth:`parse`.
        """
        file = Path(path, STRATEGY_FILE) if os.path.isdir(path) else Path(path)
        data = read_bytes(file)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _refusal(str(file), f"no UTF-8 text at byte {error.start}") from error
        return cls.parse(text, str(file))


def read_bytes(file: Path) -> bytes:
    """The bytes of one file of a run folder.

    Raises:
        StrategyError: where it is missing or cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise StrategyError(
            one_line(f"cannot read {str(file)!r}: {reason}; give the folder of a finished search")
        ) from error


def one_line(text: str) -> str:
    """Escape what would break a line or cannot be printed: layer names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _refusal(source: str, fault: str) -> StrategyError:
    return StrategyError(one_line(f"{source}: {fault}; {_WAY_OUT}"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice in one object")
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _check_version(data: Any, source: str) -> None:
    """Before anything else: a newer file may differ in every field."""
    if not isinstance(data, dict):
        return  # validation says what was expected
    if "schema_version" not in data:
        raise _refusal(source, "schema_version: missing")
    version = data["schema_version"]
    if type(version) is int and version > SCHEMA_VERSION:
        raise StrategyError(
            one_line(
                f"{source}: written by dqss {data.get('dqss', 'unknown')}, schema {version}; "
                f"this dqss reads schema {SCHEMA_VERSION}: upgrade dqss"
            )
        )
    if type(version) is not int or version != SCHEMA_VERSION:
        raise _refusal(source, f"schema_version: expected {SCHEMA_VERSION}, got {reprlib.repr(version)}")


def _first_fault(error: ValidationError) -> str:
    """``layers.conv1.weight.bits: input should be ...`` for the first of the faults."""
    faults = error.errors(include_url=False)
    first = faults[0]
    path = [str(part) for part in first["loc"]]
    # A union's tag is in the error's path but not in the file.
    before = ["", *path]
    shown = [p for b, p in zip(before, path, strict=False) if (b, p) not in UNION_TAGS]
    got = reprlib.repr(first["input"])
    match first["type"]:
        case "missing":
            what = "missing"
        case "extra_forbidden":
            what = f"unknown field{near_match(path[-1], _FIELD_NAMES)}"
        case kind if kind.startswith("recursion"):
            shown, what = shown[:1], "nested too deeply"
        case "value_error":
            what = str(first["ctx"]["error"])
        case "union_tag_not_found":
            what = f"expected an object with a 'type', got {got}"
        case "union_tag_invalid":
            shown.append("type")
            what = f"expected {first['ctx']['expected_tags']}, got {first['ctx']['tag']!r}"
        case _:
            message = re.sub(r"^Input should be ", "expected ", first["msg"])
            what = f"{message[0].lower()}{message[1:]}, got {got}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{'.'.join(shown) or 'the whole file'}: {what}{more}"


_FIELD_NAMES = {
    name
    for model in (
        Strategy,
        ModelInfo,
        LayerStrategy,
        PointStrategy,
        ProductStrategy,
        TensorChoice,
        PerChannelField,
        PerGroupField,
    )
    for name in model.model_fields
}
