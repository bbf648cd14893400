"""The configuration reference, from the comments in ``conf/``: there is no second place to keep true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
ENTRY_POINTS = ("search", "evaluate", "export", "train")
_VALUE = r"(?:'[^']*'|\"[^\"]*\"|[^#])*?"
_LINE = re.compile(rf"^(?P<indent> *)(?P<key>[\w@]+):(?: +(?P<value>{_VALUE}))?(?: +# (?P<comment>.*))?$")
_LEFT_OUT = ("defaults", "hydra")
"""Keys that are Hydra's own."""


@dataclass(frozen=True)
class Option:
    """A line of a configuration file: dotted name, default as it stands there, explanation."""

    name: str
    default: str
    meaning: str


def options(file: Path) -> Iterator[Option]:
    """The options of one file, in order; those that name code are left out."""
    above: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        indent, key = len(found["indent"]), found["key"]
        above = [entry for entry in above if entry[0] < indent]
        value, comment = (found["value"] or "").strip(), (found["comment"] or "").strip()
        if not value:
            above.append((indent, key))
        path = [name for _, name in above] + ([key] if value else [])
        if key.startswith("_") or path[0] in _LEFT_OUT or not (value or comment):
            continue
        yield Option(".".join(path), value, comment)


def target(file: Path) -> str | None:
    """What the group makes: a dotted name."""
    found = re.search(r"^_target_: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def groups() -> dict[str, list[Path]]:
    """Files by group, in alphabetical order."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__")
    return {folder.name: sorted(folder.glob("*.yaml")) for folder in folders}


def page() -> str:
    """The reference as Markdown."""
    parts = ["## Commands", ""]
    for name in ENTRY_POINTS:
        parts += [f"### python -m dqss.{name}", "", *_table(CONF / f"{name}.yaml")]
    parts += ["## Groups", ""]
    for group, files in groups().items():
        parts += [f"### {group}", ""]
        for file in files:
            made = target(file)
            parts += [f"#### {group}={file.stem}", ""]
            if group == "experiment":
                parts += ["```yaml", file.read_text(encoding="utf-8").strip(), "```", ""]
                continue
            parts += [f"Makes `{made}`.", ""] if made else []
            parts += _table(file)
    return "\n".join(parts)


def _table(file: Path) -> list[str]:
    rows = [f"| `{one.name}` | {_code(one.default)} | {_cell(one.meaning)} |" for one in options(file)]
    return ["| option | default | |", "|---|---|---|", *rows, ""] if rows else ["No options.", ""]


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")
