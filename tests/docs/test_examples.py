"""Every example in the documentation runs as it stands there, in order, page by page."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqss.fused import fused
from dqss.observers import ALGORITHMS
from tests.cli.runner import call

REPOSITORY = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[int, str, str | None, str]]:
    """Line, kind, title and text of each block of code that is meant to run.

    ``python`` blocks run, those with a title are files; ``bash`` blocks are commands. ``console``
    blocks have gaps for the reader to fill: they do not run.
    """
    text = page.read_text()
    for found in FENCE.finditer(text):
        if found["kind"] in ("python", "bash"):
            yield text.count("\n", 0, found.start()) + 2, found["kind"], found["title"], found["body"]


def commands(body: str) -> list[list[str]]:
    """The words of each command, continued lines joined."""
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run(page: Path, folder: Path) -> None:
    """All blocks of a page, one after the other, in one folder and one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, kind, title, body in blocks(page):
        if title is not None:
            (folder / title).write_text(body)
        elif kind == "python":
            # With the page's own line numbers in a traceback.
            exec(compile("\n" * (line - 1) + body, str(page), "exec"), names)
        else:
            for words in commands(body):
                assert words[:2] == ["python", "-m"] and words[2].startswith("dqss."), words
                outcome = call(words[2].removeprefix("dqss."), *words[3:], cwd=folder)
                assert outcome.code == 0, (words, outcome.err)


WITH_EXAMPLES = [page for page in PAGES if page.name != "README.md" and any(blocks(page))]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        with fused(False):
            run(page, tmp_path)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]
        ALGORITHMS.pop("shrunk", None)


def test_there_are_examples() -> None:
    assert {page.stem for page in WITH_EXAMPLES} >= {"tutorial", "recipes", "strategy"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_what_there_is(page: Path) -> None:
    """Entry points exist."""
    for name in re.findall(r"python -m (dqss\.\w+)", page.read_text()):
        assert importlib.util.find_spec(name) is not None, name
