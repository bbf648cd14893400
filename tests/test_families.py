"""Networks of every family, end to end, and what users wrap around them."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from dqss import PTQSettings, apply_strategy, search_ptq
from dqss.discretize import RefineSettings
from dqss.errors import ModelError
from dqss.lit.search import SearchResult
from dqss.space import Rule, SearchSpace
from tests.support.nets import cnn, images, small_space

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "families"
SMALLEST = (
    "mobilenetv3_small_050",  # batch norms with activations, squeeze and excitation
    "nf_regnet_b0",  # standardized weights, "same" padding
    "mobileone_s0",  # branches to merge
)
"""Prepared in ways of their own. Attention is in the next test, all families are in the slow one."""
QUICK = PTQSettings(
    steps=2, batch_size=2, refine=RefineSettings(passes=4, alternatives=1), finalists=1, discrete_every=0
)


def families(*arguments: str, results: Path) -> list[dict[str, str]]:
    """The rows of the study for the models named (none: all), computed now."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(STUDY.parent.parent)}
    command = [sys.executable, str(STUDY / "run.py"), *arguments, "--results", str(results)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def searched(model: nn.Module, space: SearchSpace | None = None) -> SearchResult:
    return search_ptq(model, images(6), space or small_space(), QUICK, trainer={"accelerator": "cpu"})


@torch.no_grad()
def applied_as_simulated(result: SearchResult, inputs: Tensor) -> bool:
    """The bundle on the user's model gives what the supernet measured, bit for bit."""
    with result.supernet.assign(result.discretized.assignments[result.discretized.exported]):
        simulated = result.supernet(inputs)
    return torch.equal(apply_strategy(result.model, result.bundle)(inputs), simulated)


def test_smallest_families(tmp_path: Path) -> None:
    rows = families(*SMALLEST, results=tmp_path / "rows.csv")
    assert {row["model"] for row in rows} == set(SMALLEST)
    for row in rows:
        assert row["status"] == "pass", row
        assert row["applied_equals_simulated"] == "True"
        assert float(row["float_error"]) < 1e-4 < float(row["quantized_error"])
    prepared = {row["model"]: row["prepare"].split() for row in rows}
    assert "bake_weight_standardization" in prepared["nf_regnet_b0"]
    assert "reparameterize" in prepared["mobileone_s0"]
    assert "fold_batch_norm" in prepared["mobilenetv3_small_050"]


def test_a_family_with_its_products(tmp_path: Path) -> None:
    (row,) = families("--products", "pvt_v2_b0", results=tmp_path / "rows.csv")
    assert (row["status"], row["products"], row["hidden_products"]) == ("pass", "8", "0"), row


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_families(tmp_path: Path) -> None:
    rows = families(results=tmp_path / "rows.csv")
    for source, count, least in (("timm", 50, 47), ("torchvision", 10, 9)):
        statuses = [row["status"] for row in rows if row["source"] == source]
        assert len(statuses) == count
        assert statuses.count("pass") >= least
    assert all(row["reason"] for row in rows if row["status"] == "refused")
    assert not [row for row in rows if row["status"] not in ("pass", "refused")]


def test_committed_rows_are_those_of_the_list() -> None:
    lines = [line.split("#")[0].split() for line in (STUDY / "models.txt").read_text().splitlines()]

    def committed(name: str) -> list[list[str]]:
        with (STUDY / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [[row[key] for key in ("source", "family", "model", "input")] for row in rows]

    listed = [line[:4] for line in lines if line]
    assert committed("results.csv") == listed
    some = committed("products.csv")
    assert some == [line for line in listed if line in some]


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))],
    ids=["DataParallel", "compile", "both"],
)
def test_wrapped_models_give_the_result_of_what_they_wrap(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = cnn()
    torch.manual_seed(1)
    plain = searched(model)
    torch.manual_seed(1)
    wrapped = searched(wrap(model))
    assert wrapped.bundle.strategy.layers == plain.bundle.strategy.layers
    assert wrapped.bundle.strategy.model == plain.bundle.strategy.model
    assert wrapped.bundle.tensors.keys() == plain.bundle.tensors.keys()
    for name, tensor in plain.bundle.tensors.items():
        assert torch.equal(wrapped.bundle.tensors[name], tensor)
    probe = images(2)
    assert applied_as_simulated(wrapped, probe)
    with torch.no_grad():  # a strategy found on one fits the other
        assert torch.equal(
            apply_strategy(wrap(model), plain.bundle)(probe), apply_strategy(model, wrapped.bundle)(probe)
        )


class Squaring(nn.Linear):
    """Not linear in its weight: may only be in a network if it is skipped."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_skipping_by_name_means_the_wrapped_layer(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = wrap(nn.Sequential(Squaring(4, 4), nn.Linear(4, 3)))
    model = wrap(cnn().append(inner).eval())
    with pytest.raises(ModelError, match=r"'7\.0'.*search_space\.skip=\[7\.0\]"):
        searched(model)
    result = searched(model, small_space(skip=("7.0",)))
    assert "7.0" in result.supernet.coverage.skipped
    assert "7.1" in result.bundle.strategy.layers
    assert applied_as_simulated(result, images(2))


@pytest.mark.parametrize(
    "normed",
    [
        parametrizations.weight_norm,
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")),
    ],
    ids=["parametrization", "hook"],
)
def test_normalized_weights_are_quantized_as_they_are_multiplied(
    normed: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(normed(nn.Conv2d(3, 5, 3)), nn.ReLU(), nn.Flatten(), normed(nn.Linear(80, 4)))
    with torch.no_grad():  # far from the norms that the layers began with
        for layer in (model[0], model[3]):
            for name, parameter in layer.named_parameters():
                if name.endswith(("original0", "_g")):
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.eval()
    product = model[0](torch.zeros(1, 3, 6, 6)), model[0].weight  # the hook writes it when it is called
    result = searched(model)
    assert list(result.bundle.strategy.layers) == ["0", "3"]
    scale = result.bundle.tensors["0.weight.scale"]
    codes = apply_strategy(model, result.bundle)[0].weight.flatten(1) / scale[:, None]
    assert (codes - codes.round()).abs().max() < 1e-4
    limits = product[1].detach().flatten(1).abs().amax(1) / 3  # three bits: -3 to 3
    assert (scale <= limits * (1 + 1e-5)).all()
    assert applied_as_simulated(result, images(2))


class MixesHeads(nn.Module):
    """A layer over a strided view, for which torch has two kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 2, 1)
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.lift(x).permute(0, 2, 3, 1)).flatten(1)


def test_layers_left_in_float_are_rounded_as_in_the_search() -> None:
    """Torch chooses the kernel of ``mix`` by whether its weight requires gradients."""
    weight = small_space().rules[-1].weight
    space = SearchSpace("weights", (Rule(names=("mix",), skip=True), Rule(weight=weight)))
    assert applied_as_simulated(searched(MixesHeads().eval(), space), images(2))


class Attention(nn.Module):
    """Attention over the pixels, with torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_multihead_attention() -> None:
    model = Attention().eval()
    result = searched(model)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    layers = result.bundle.strategy.layers
    assert set(layers) == {
        "embed",
        *(f"{name}.{key}" for name in ("attention", "encoder.self_attn") for key in projections),
        "encoder.linear1",
        "encoder.linear2",
        "head",
    }
    assert all(layer.weight is not None and layer.activation is not None for layer in layers.values())
    assert result.supernet.coverage.products == ["encoder.self_attn.product0", "attention.product0"]
    probe = images(2)
    assert applied_as_simulated(result, probe)
    with torch.no_grad():
        assert not torch.equal(model(probe), apply_strategy(model, result.bundle)(probe))
