"""The page as text: what is in it, what cannot happen in it, and what the command says."""

import base64
import csv
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dqss.report.__main__ import main
from dqss.report.headline import size
from dqss.report.page import render, write_report
from dqss.report.run import Run
from dqss.strategy import Strategy
from tests.report.conftest import CLOSING, SCRIPT


class Page(HTMLParser):
    """All tags with their attributes, and the text inside of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self._script = True

    def handle_endtag(self, tag: str) -> None:
        self._script = self._script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def data(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_every_search_leaves_one_and_the_command_writes_the_same(run: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / "report.html").read_text().replace(str(run), str(copy))
    assert main([str(copy)]) == 0
    assert capsys.readouterr().out == f"report in {copy / 'report.html'}\n"
    assert (copy / "report.html").read_text() == before


def test_numbers_are_those_of_the_strategy(run: Path, page: Page) -> None:
    strategy, (data,) = Strategy.load(run), page.data
    choices = list(strategy.choices())
    assert len(data["tensors"]) == len(choices) == 6
    for (layer, role, choice), shown in zip(choices, data["tensors"], strict=True):
        assert [shown["layer"], shown["role"], shown["bits"]] == [layer, role, choice.bits]
        assert [shown["probability"], shown["margin"]] == [choice.probability, choice.margin]
        assert shown["label"] == choice.candidate().label
    uri = next(attrs["href"] for tag, attrs in page.tags if attrs.get("download") == "strategy.json")
    assert base64.b64decode(uri.split(",")[1]) == (run / "strategy.json").read_bytes()


def test_measurements_are_those_of_the_metrics(run: Path) -> None:
    text, metrics = (run / "report.html").read_text(), json.loads((run / "metrics.json").read_text())
    found = dict(re.findall(r'data-value="([^"]+)">([^<]+)<', text))
    rows = ("float", "best_uniform", "searched")
    assert set(found) == {f"{row}.{name}" for row in rows for name in ("top1", "kl")}
    for key, shown in found.items():
        row, name = key.split(".")
        measured = metrics[row]["validation"]
        wanted = f"{100 * measured['top1']:.2f} %" if name == "top1" else f"{measured['distance']:.4f}"
        assert shown == wanted


def test_courses_are_those_of_the_files(run: Path, page: Page) -> None:
    (data,) = page.data
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert data["history"]["soft_loss"] == [float(row["soft_loss"]) for row in rows]
    known = [float(row["discrete_distance"]) if row["discrete_distance"] else None for row in rows]
    assert data["history"]["discrete_distance"] == known
    course = safetensors.numpy.load_file(run / "trajectory.safetensors")
    assert data["trajectorySteps"] == course["steps"].tolist()
    for name, decision in data["decisions"].items():
        wanted = course[f"probabilities.{name}"]
        assert np.abs(np.array(decision["trajectory"]) - wanted).max() <= 0.0005 + 1e-7


def test_names_of_strangers_are_words(page: Page) -> None:
    kinds = [attrs.get("type") for tag, attrs in page.tags if tag == "script"]
    assert kinds == ["application/json", None, None]  # data, plotly, the page's own: no other
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any(attrs.get("src") == "x" for _, attrs in page.tags)
    assert {SCRIPT, CLOSING} <= {tensor["layer"] for tensor in page.data[0]["tensors"]}


def test_a_name_in_words_is_escaped(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "<b>run & co")
    data = json.loads((copy / "strategy.json").read_text())
    data["model"]["name"] = CLOSING
    data["search_space"] = SCRIPT
    data["budget"] = {"limits": {"size": 2048}, "achieved": {"size": 1024.5}}
    (copy / "strategy.json").write_text(json.dumps(data))
    (copy / "config.yaml").write_text(f"model: {CLOSING}\n")
    (copy / "pareto").mkdir()
    (copy / "pareto" / "bits.csv").write_text(f"{CLOSING},kl\n1,2\n{SCRIPT},nan\n")
    text = render([Run.read(copy), Run.read(run)])
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 3 and CLOSING not in text
    assert html.escape(f"python {CLOSING}", quote=False).replace(">", "&gt;") in text
    assert "<dt>budget: size</dt><dd>1,024.5 of at most 2,048</dd>" in text
    assert not any(tag == "b" or attrs.get("src") == "x" for tag, attrs in page.tags)
    assert page.data[0]["pareto"] == {"header": [CLOSING, "kl"], "rows": [[1.0, 2.0], [SCRIPT, None]]}


def test_curves_of_several_limits_are_one_with_what_they_have_in_common(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run") / "pareto"
    folder.mkdir()
    (folder / "average_weight_bits.csv").write_text("budget,average_weight_bits,kl\n3,2.9,0.2\n")
    (folder / "size_mb.csv").write_text("budget,size_mb,kl\n1.5,1.4,0.1\n2,1.9,0.05\n")
    page = Page(render([Run.read(folder.parent)]))
    rows = [["average_weight_bits", 3.0, 0.2], ["size_mb", 1.5, 0.1], ["size_mb", 2.0, 0.05]]
    assert page.data[0]["pareto"] == {"header": ["limit", "budget", "kl"], "rows": rows}


def test_nothing_is_fetched(run: Path, enlarged: Path) -> None:
    for folder in (run, enlarged):
        page = Page((folder / "report.html").read_text())
        for tag, attrs in page.tags:
            assert tag not in ("link", "iframe", "object", "embed", "base")
            for name in ("src", "href"):
                assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, attrs)
        (rules,) = (attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
        assert rules is not None and rules.startswith("default-src 'none'; ")
        assert "script-src 'sha256-" in rules and "http" not in rules


def test_several_runs_side_by_side(run, other_run, enlarged, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(other_run), str(enlarged)]) == 0
    page = Page((tmp_path / "side_by_side_report.html").read_text())
    assert [data["name"] for data in page.data] == ["run", "other", "enlarged"]
    options = [attrs.get("value") for tag, attrs in page.tags if tag == "option"]
    assert [value for value in options if value] == ["0", "1", "2"]


def test_a_strategy_alone_is_enough(run: Path, tmp_path: Path) -> None:
    """Of a run of an older version, say."""
    shutil.copy(run / "strategy.json", tmp_path)
    page = Page(write_report([tmp_path]).read_text())
    (data,) = page.data
    assert [tensor["probability"] for tensor in data["tensors"]] == [
        choice.probability for _, _, choice in Strategy.load(run).choices()
    ]
    assert data["decisions"] == {} and data["history"] == {}
    assert "There are no measurements in this folder." in " ".join(page.words)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "[1]", r"metrics\.json: damaged \(not a JSON object\): restore it, or remove it"),
        ("metrics.json", "{", r"metrics\.json: damaged"),
        ("history.csv", "step,soft_loss\n1,x\n", r"history\.csv: damaged \(could not convert"),
        ("history.csv", "step,soft_loss\n1\n", r"history\.csv: damaged \(rows of several lengths\)"),
        ("trajectory.safetensors", "nothing", r"trajectory\.safetensors: damaged"),
        ("report.json", "{}", r"report\.json: damaged"),
        ("config.yaml", b"\xff\xfe\xff", r"config\.yaml: damaged"),
        ("strategy.json", "{}", r"strategy\.json: schema_version: missing"),
    ],
)
def test_damage_is_one_line(run: Path, tmp_path: Path, capsys, file: str, content: Any, message: str) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(copy)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said), said


def test_no_run_is_one_line(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "give the folder of a finished search" in capsys.readouterr().err


def test_sizes_as_people_read_them() -> None:
    assert [size(count) for count in (0, 1000, 1536, 3 * 2**20, 5 * 2**30)] == [
        "0 B", "1000 B", "1.5 KiB", "3 MiB", "5 GiB",
    ]  # fmt: skip
