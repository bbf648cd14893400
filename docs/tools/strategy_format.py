"""The fields of ``strategy.json``, from the models that check it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dqss.choice import LayerStrategy, ProductStrategy, TensorChoice
from dqss.schema import json_schema
from dqss.strategy import ModelInfo, Strategy

MODELS: tuple[type[BaseModel], ...] = (Strategy, ModelInfo, LayerStrategy, ProductStrategy, TensorChoice)


def page() -> str:
    """A table for each part of the file, as Markdown."""
    definitions = json_schema()
    parts: list[str] = []
    for model in MODELS:
        schema = definitions if model is Strategy else definitions["$defs"][model.__name__]
        summary, _ = _docstring(model)
        parts += [
            f"### {model.__name__}",
            "",
            summary,
            "",
            "| field | type | needed | |",
            "|---|---|---|---|",
        ]
        parts += [*_rows(model, schema), ""]
    return "\n".join(parts)


def _rows(model: type[BaseModel], schema: dict[str, Any]) -> Iterator[str]:
    _, attributes = _docstring(model)
    needed = schema.get("required", [])
    for name, field in schema["properties"].items():
        must = "yes" if name in needed else ""
        yield f"| `{name}` | {_type(field)} | {must} | {attributes.get(name, '')} |"


def _docstring(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """First paragraph, and what the section ``Attributes`` says of each name."""
    summary, _, rest = textwrap.dedent(" " * 4 + (model.__doc__ or "")).strip().partition("\n\n")
    section = rest.partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", textwrap.indent(textwrap.dedent(section), " " * 4)):
        names, _, text = " ".join(entry.split()).partition(": ")
        found |= {name.strip(): text for name in names.split(",") if name.strip()}
    return " ".join(summary.split()), found


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[1]
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(map(_type, field[several]))
    kind = str(field.get("type", "any"))
    inside = field.get("additionalProperties") if kind == "object" else field.get("items")
    if isinstance(inside, dict) and inside:
        return f"{kind} of {_type(inside)}"
    return kind
