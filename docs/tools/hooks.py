"""Hooks of mkdocs: a page that holds a marker gets what is made from the code in its place."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# mkdocs loads this file by its path, not as a part of a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.tools import configuration, strategy_format

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")
"""Of Sphinx, before a name in code: editors understand them, Markdown does not."""

MADE = {"<!-- configuration -->": configuration.page, "<!-- strategy -->": strategy_format.page}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made from the code."""
    for marker, make in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of names in docstrings."""
    return _ROLE.sub("", html)
