"""The page in a browser without a network: it works, says what the files say, and asks for nothing."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dqss.report.page import write_report
from dqss.strategy import Strategy
from tests.report.conftest import CLOSING, SCRIPT

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("DQSS_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: install one, or name it in DQSS_BROWSER")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@dataclass
class Opened:
    """A page with all that it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def rows(self) -> list[list[str]]:
        """Cells of the rows shown, up to the heat-map, without arrows and types."""
        return self.page.evaluate(
            "() => [...document.querySelectorAll('#table tbody tr')].filter((r) => !r.hidden)"
            ".map((r) => [...r.children].slice(0, 8).map((c) => c.title || c.textContent.trim()))"
        )

    def column(self, title: str) -> list[str]:
        heads = self.page.evaluate(
            "() => [...document.querySelectorAll('#table th')].map((c) => c.dataset.key)"
        )
        return [row[heads.index(title)] for row in self.rows()]


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    contexts = []

    def go(file: Path, **options: Any) -> Opened:
        context = browser.new_context(offline=True, **{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("dialog", lambda dialog: (found.said.append("alert"), dialog.dismiss()))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto(file.as_uri())
        found.page.wait_for_selector("#chart-evolution .main-svg, #chart-evolution .note")
        return found

    yield go
    for context in contexts:
        context.close()


def agrees(view: Opened, folder: Path) -> None:
    """The page says what the files of its run say, makes no error, and asks for nothing."""
    choices = list(Strategy.load(folder).choices())
    assert view.column("layer") == [layer for layer, _, _ in choices]
    assert view.column("role") == [role for _, role, _ in choices]
    assert view.column("label") == [choice.candidate().label for _, _, choice in choices]
    for key in ("probability", "margin"):
        wanted = [f"{getattr(choice, key):.2f}" for _, _, choice in choices]
        assert [float(cell) for cell in view.column(key)] == [float(value) for value in wanted]
    metrics = json.loads((folder / "metrics.json").read_text())
    part = "validation" if metrics["searched"]["validation"] else "selection"
    for row in [name for name in ("float", "best_uniform", "searched") if metrics[name]]:
        shown = view.page.inner_text(f"[data-value='{row}.{metrics['distance']}']")
        assert shown == f"{metrics[row][part]['distance']:.4f}"
    assert view.said == []
    assert [url for url in view.asked if not url.startswith("data:")] == [(folder / "report.html").as_uri()]


def test_it_says_what_the_files_say_and_asks_for_nothing(opened, run: Path, enlarged: Path) -> None:
    for folder in (run, enlarged):
        agrees(opened(folder / "report.html"), folder)


RUNS = [Path(folder) for folder in os.environ.get("DQSS_REPORT_RUNS", "").split(os.pathsep) if folder]


@pytest.mark.skipif(not RUNS, reason="name run folders in DQSS_REPORT_RUNS to try their pages")
@pytest.mark.parametrize("folder", RUNS, ids=str)
@pytest.mark.parametrize("width", [1400, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_of_runs_that_are_named(opened, folder: Path, width: int, scheme: str) -> None:
    file = folder.absolute() / "report.html"
    view = opened(file, viewport={"width": width, "height": 900}, color_scheme=scheme)
    agrees(view, folder.absolute())
    assert view.page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_every_chosen_option_has_its_frame(opened, run: Path) -> None:
    view, choices = opened(run / "report.html"), list(Strategy.load(run).choices())
    framed = view.page.evaluate(
        "() => [...document.querySelectorAll('#table td.chosen')].map((c) => c.title)"
    )
    wanted = [
        f"{c.candidate().label} {c.candidate().spec.scheme}: {round(c.probability, 4)}" for _, _, c in choices
    ]
    assert [title.split(": ")[0] for title in framed] == [title.split(": ")[0] for title in wanted]
    assert [float(t.split(": ")[1]) for t in framed] == [float(t.split(": ")[1]) for t in wanted]


def test_names_of_strangers_do_nothing(opened, run: Path) -> None:
    view = opened(run / "report.html")
    for name in (SCRIPT, CLOSING):
        view.page.click(f"#table td.layer[title={json.dumps(name)}]")
        assert view.page.inner_text("#details h3").startswith(name)
    view.page.hover("#chart-evolution .nsewdrag")
    view.page.wait_for_timeout(200)
    assert view.said == [] and view.page.locator("img[src='x']").count() == 0


def test_sorting(opened, run: Path) -> None:
    view = opened(run / "report.html")
    before = view.rows()
    for key, down in (("sensitivity", True), ("margin", True), ("layer", False)):
        view.page.click(f"#table th[data-key='{key}'] button")
        assert view.page.get_attribute(f"#table th[data-key='{key}']", "aria-sort") == (
            "descending" if down else "ascending"
        )
        found = view.column(key)
        values = [float(cell) for cell in found] if key != "layer" else [cell.lower() for cell in found]
        if key != "layer":
            assert values == sorted(values, reverse=down)
        view.page.click(f"#table th[data-key='{key}'] button")
        assert view.column(key)[0] == found[-1]
        assert sorted(view.rows()) == sorted(before)
    view.page.click("#reset")
    assert view.rows() == before


def test_searching_and_filtering(opened, run: Path) -> None:
    view = opened(run / "report.html")
    view.page.keyboard.press("/")
    view.page.keyboard.type("HEAD & LIN")
    assert view.column("layer") == ["head & tail"] * 2
    assert view.page.inner_text("#count") == "2 of 6 tensors"
    view.page.keyboard.press("Escape")
    assert len(view.rows()) == 6
    view.page.select_option("#role", "activation")
    assert view.column("role") == ["activation"] * 3
    choice = view.column("label")[0]
    view.page.select_option("#choice", choice)
    assert set(view.column("label")) == {choice}
    view.page.click("#reset")
    view.page.check("#undecided")
    margins = [c.margin for _, _, c in Strategy.load(run).choices()]
    assert len(view.rows()) == sum(margin < 0.5 for margin in margins)


def test_keys_walk_through_the_rows(opened, run: Path) -> None:
    view, layers = opened(run / "report.html"), [layer for layer, _, _ in Strategy.load(run).choices()]
    view.page.focus("#table tr[tabindex='0']")
    for key, row in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", 5),
        ("ArrowDown", 5),
        ("Home", 0),
    ):
        view.page.keyboard.press(key)
        assert view.page.inner_text("#details h3").startswith(layers[row])
        assert view.page.evaluate("() => document.activeElement.getAttribute('aria-selected')") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, run: Path, scheme: str) -> None:
    view = opened(run / "report.html", color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]

    def shade() -> tuple[str, float]:
        theme = view.page.get_attribute("html", "data-theme")
        colour = view.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return theme, sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    assert shade()[0] == scheme and (shade()[1] > 384) == (scheme == "light")
    while view.page.inner_text("#theme span") != other:
        view.page.click("#theme")
    assert shade()[0] == other and (shade()[1] > 384) == (other == "light")
    # On paper it is light whatever the screen is.
    view.page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert shade()[0] == "light"


def test_narrow_screens_scroll_one_way_only(opened, run: Path, enlarged: Path) -> None:
    for folder in (run, enlarged):
        view = opened(folder / "report.html", viewport={"width": 360, "height": 740})
        assert view.page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_runs_side_by_side(opened, run: Path, other_run: Path, tmp_path: Path) -> None:
    file = write_report([run, other_run], tmp_path / "both.html")
    view, strategies = opened(file), [Strategy.load(folder) for folder in (run, other_run)]
    labels = [
        [f"{c.candidate().label} {c.candidate().spec.scheme}" for _, _, c in s.choices()] for s in strategies
    ]
    for number, strategy in enumerate(strategies):
        view.page.select_option("#run", str(number))
        assert view.column("label") == [c.candidate().label for _, _, c in strategy.choices()]
    different = sum(a != b for a, b in zip(*labels, strict=True))
    assert view.page.text_content("#compared") == f"{different} of 6 tensors"
    assert view.said == []


def large(folder: Path, run: Path, layers: int, options: int) -> Path:
    """The files of ``run`` grown to a network of so many layers."""
    strategy, record = (json.loads((run / name).read_text()) for name in ("strategy.json", "report.json"))
    layer, (tensor, *_), (name, decision) = (
        next(iter(strategy["layers"].values())), record["tensors"], next(iter(record["decisions"].items())),
    )  # fmt: skip
    labels = [f"algorithm_{k}@4" for k in range(options)]
    decision |= {
        "labels": labels, "schemes": ["symmetric channel"] * options, "outcome": list(range(options)),
        "probabilities": [1 / options] * options, "effects": [float(k) for k in range(options)],
        "preferred": 0, "chosen": 0,
    }  # fmt: skip
    strategy["layers"], record["tensors"], record["decisions"] = {}, [], {}
    for k in range(layers):
        both = {
            role: {**layer["weight"], "decision": f"stages.{k}.conv.{role}"}
            for role in ("weight", "activation")
        }
        strategy["layers"][f"stages.{k}.conv"] = both
        for role in both:
            name = f"stages.{k}.conv.{role}"
            ranges = [tensor["ranges"][0]] * options
            record["tensors"].append(
                {**tensor, "layer": f"stages.{k}.conv", "role": role, "decision": name, "ranges": ranges}
            )
            record["decisions"][name] = decision
    shutil.copytree(run, folder)
    for file, data in (("strategy.json", strategy), ("report.json", record)):
        (folder / file).write_text(json.dumps(data))
    _course(folder, list(record["decisions"]), options)
    return folder


def _course(folder: Path, names: list[str], options: int) -> None:
    import numpy as np
    import safetensors.numpy

    rows = np.full((64, options), 1 / options, np.float32)
    course = {f"probabilities.{name}": rows for name in names}
    steps = np.arange(64)
    (folder / "trajectory.safetensors").write_bytes(safetensors.numpy.save({"steps": steps, **course}))


def test_two_hundred_layers_open_in_two_seconds(opened, run: Path, tmp_path: Path) -> None:
    file = write_report([large(tmp_path / "large", run, 200, 10)])
    view = opened(file)
    assert len(view.rows()) == 400
    session = view.page.context.new_cdp_session(view.page)
    # Seconds of the page's own thread: what else runs on the machine does not count.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    view.page.reload()
    view.page.wait_for_selector("#chart-evolution .main-svg")
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < 2.0
