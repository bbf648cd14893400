"""A new algorithm is one file and one line: here is the file, and the line is the fixture's."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import dqss
from dqss.apply import apply_strategy
from dqss.discretize import RefineSettings
from dqss.errors import SearchSpaceError
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.observers import ALGORITHMS, Algorithm, Statistics
from dqss.observers.base import bounded_range
from dqss.spec import QuantSpec
from search_spaces import uniform
from tests.support.nets import cnn, images

SETTINGS = PTQSettings(steps=6, batch_size=8, refine=RefineSettings(passes=6), discrete_every=3)


@dataclass(frozen=True)
class Deviations(Algorithm):
    """Clip ``k`` standard deviations from the mean."""

    k: float = 3.0
    name: ClassVar[str] = "deviations"

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        total = stats.counts.sum(1)
        mean = (stats.values * stats.counts).sum(1) / total
        spread = ((stats.values - mean[:, None]).square() * stats.counts).sum(1).div(total).sqrt()
        low, high = mean - self.k * spread, mean + self.k * spread
        if spec.mirrored:
            high = torch.maximum(-low, high)
            low = -high
        return bounded_range(low, high, stats, spec)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, Deviations.name, Deviations)


@pytest.mark.usefixtures("registered")
def test_it_is_searched_written_read_and_applied(tmp_path: Path) -> None:
    model, inputs = cnn(), images(40)
    entries = [{"name": "deviations", "k": 1.0}, {"name": "deviations", "k": 2.0}]
    space = uniform(
        3,
        3,
        weight_algorithms=[*entries, "minmax"],
        activation_algorithms=entries,
        weight_granularity=["channel", "group"],
        weight_group_size=8,
        activation_symmetric=[True, False],
        activation_signed=[True, False],
    )
    result = search_ptq(model, inputs, space, SETTINGS, run_dir=tmp_path)
    searched, best = (result.metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform"))
    assert searched <= best
    chosen = [choice for _, role, choice in result.bundle.strategy.choices() if role == "activation"]
    assert chosen and all(choice.algorithm == "deviations" for choice in chosen)
    loaded = dqss.load(tmp_path)
    with torch.no_grad(), result.supernet.assign(result.discretized.assignments[result.discretized.exported]):
        wanted = result.supernet(inputs)
        assert torch.equal(apply_strategy(model, loaded)(inputs), wanted)


@pytest.mark.usefixtures("registered")
def test_its_parameters_are_its_own() -> None:
    model, inputs = cnn(), images(40)
    space = uniform(4, 4, [{"name": "deviations", "k": 1.5}], ["deviations"])
    result = search_ptq(model, inputs, space, SETTINGS)
    weight = result.supernet.layers["6"].weight
    assert weight is not None
    rows = model[6].weight.detach()
    high = rows.mean(1).abs() + 1.5 * rows.std(1, correction=0)
    assert (high < rows.abs().amax(1)).any()
    wanted = torch.minimum(high, rows.abs().amax(1)) / 7
    torch.testing.assert_close(weight[0].scale, wanted, rtol=1e-5, atol=0)


def test_without_the_line_it_is_unknown() -> None:
    with pytest.raises(SearchSpaceError, match="unknown algorithm 'deviations'"):
        search_ptq(cnn(), images(12), uniform(4, 4, ["deviations"]), SETTINGS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_sixteen_bits_from_end_to_end(tmp_path: Path, symmetric: bool) -> None:
    model, inputs = cnn(), images(40)
    space = uniform(
        16,
        16,
        ["minmax", "mse", "entropy"],
        ["minmax", "mse", "hessian", "moving_average"],
        weight_symmetric=symmetric,
        activation_symmetric=symmetric,
        weight_granularity=["tensor", "channel", "group"],
        weight_group_size=7,
    )
    result = search_ptq(model, inputs, space, SETTINGS, run_dir=tmp_path)
    with torch.no_grad():
        reference = model(inputs)
        for mode in ("relaxed", "discrete"):
            with result.supernet.mode(mode):
                torch.testing.assert_close(result.supernet(inputs), reference, rtol=0, atol=2e-3)
        with result.supernet.assign(result.discretized.assignments[result.discretized.exported]):
            wanted = result.supernet(inputs)
        assert torch.equal(apply_strategy(model, dqss.load(tmp_path))(inputs), wanted)
    for layer in result.supernet.layers.values():
        assert layer.weight is not None
        codes = layer.weight[0].codes(torch.randn(layer.weight.stack.shape))
        assert codes.integers.dtype == torch.int32
        assert codes.integers.max() > 255
    assert result.metrics["searched"]["selection"]["distance"] < 1e-6
