"""The reference pages are complete, and the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from docs.tools import configuration, strategy_format
from dqss.schema import json_schema

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = [*(configuration.CONF / f"{name}.yaml" for name in configuration.ENTRY_POINTS)]
FILES += [file for files in configuration.groups().values() for file in files]


def flat(config: DictConfig, above: str = "") -> dict[str, object]:
    """Dotted names and values as OmegaConf reads them."""
    found: dict[str, object] = {}
    for key, value in OmegaConf.to_container(config).items():  # type: ignore[union-attr]
        name = f"{above}{key}"
        if name in ("defaults", "hydra") or str(key).startswith("_"):
            continue
        found |= (
            flat(OmegaConf.create(value), f"{name}.") if isinstance(value, dict) and value else {name: value}
        )
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_is_there_with_its_default(file: Path) -> None:
    wanted = flat(OmegaConf.load(file))
    shown = {one.name: one for one in configuration.options(file) if one.default}
    assert list(shown) == list(wanted)
    for name, value in wanted.items():
        assert OmegaConf.to_container(OmegaConf.create(f"x: {shown[name].default}"))["x"] == value


def test_every_file_and_option_is_on_the_page() -> None:
    page = configuration.page()
    for group, files in configuration.groups().items():
        for file in files:
            assert f"#### {group}={file.stem}\n" in page
            if group != "experiment":
                assert all(f"| `{one.name}` |" in page for one in configuration.options(file))


def test_every_field_of_a_strategy_is_on_the_page() -> None:
    page, schema = strategy_format.page(), json_schema()
    parts = {"Strategy": schema, **schema["$defs"]}
    for model in strategy_format.MODELS:
        section = page.split(f"### {model.__name__}\n")[1].split("\n### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(
            parts[model.__name__]["properties"]
        )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'dqss[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    outcome = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    for page in ("index", "tutorial", "configuration", "api"):
        text = (tmp_path / "site" / f"{page}.html").read_text()
        # What a page loads by itself lies beside it.
        loaded = re.findall(r"<(?:script|img|link rel=\"stylesheet\")[^>]*?(?:src|href)=\"([^\"]+)\"", text)
        assert loaded and not [address for address in loaded if address.startswith(("http", "//"))]
    assert ":class:" not in (tmp_path / "site" / "api.html").read_text()
