"""What a search keeps for its report, against the network itself."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dqss import load
from dqss.apply import apply_strategy
from dqss.data.bicubic import resize
from dqss.errors import StrategyError
from dqss.lit.examples import FLOAT, SEARCHED, framed
from dqss.lit.record import clip_range
from dqss.lit.search import search_ptq
from dqss.losses import KLDivergence
from dqss.mixing import Grid
from dqss.quantizers import StaticQuantizer
from dqss.report.pictures import crops, data_uri, thumbnail, worst_corner
from dqss.report.record import RunRecord
from dqss.samples import split
from dqss.spec import Candidate, PerChannel, QuantSpec
from tests.report.conftest import QUICK, SCRIPT, Doubler, hostile
from tests.support.nets import small_space


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_range_is_what_comes_out_of_the_largest_values(symmetric: bool) -> None:
    spec = QuantSpec(3, symmetric, PerChannel(0))
    quantizer = StaticQuantizer(Candidate.of("minmax", spec), 5)
    quantizer.scale.copy_(torch.rand(5) + 0.1)
    if not symmetric:
        quantizer.zero_point.copy_(torch.randint(0, 8, (5,)))
    ends = [quantizer(torch.full((5, 1), value))[:, 0] for value in (-1e6, 1e6)]
    found = clip_range(Grid(quantizer.scale, quantizer.zero_point, spec))
    assert [found.low, found.high] == pytest.approx([float(np.median(end)) for end in ends])
    assert [found.lowest, found.highest] == pytest.approx([float(ends[0].min()), float(ends[1].max())])


def test_the_record_describes_every_choice_of_the_strategy(run: Path) -> None:
    bundle, record = load(run), RunRecord.load(run)
    assert record is not None
    tensors = {(one.layer, one.role): one for one in record.tensors}
    choices = {(layer, role): choice for layer, role, choice in bundle.strategy.choices()}
    assert list(tensors) == list(choices) and any(layer == SCRIPT for layer, _ in choices)
    for key, choice in choices.items():
        decision = record.decisions[choice.decision]
        assert decision.labels[decision.chosen] == choice.candidate().label
        assert decision.probabilities[decision.chosen] == choice.probability
        scale, zero_point = (bundle.tensors[f"{key[0]}.{key[1]}.{name}"] for name in ("scale", "zero_point"))
        grid = Grid(scale, zero_point, choice.candidate().spec)
        assert tensors[key].ranges[decision.chosen] == clip_range(grid)
        assert decision.effects is not None
        by_outcome = dict(zip(decision.outcome, decision.effects, strict=True))
        assert sum(by_outcome.values()) == pytest.approx(0, abs=1e-6)


def test_histograms_are_of_the_tensors_themselves(run: Path) -> None:
    record, model = RunRecord.load(run), hostile()
    assert record is not None
    torch.manual_seed(5)
    inputs = torch.randn(60, 3, 8, 8)[:40]
    searched = inputs[sorted(split(40, QUICK.parts, 0)[0])]
    first = next(one for one in record.tensors if one.layer == SCRIPT and one.role == "activation")
    assert first.histogram is not None
    assert [first.histogram.low, first.histogram.high] == [float(searched.min()), float(searched.max())]
    assert sum(first.histogram.counts) == searched.numel()
    for one in record.tensors:
        if one.role == "weight" and one.histogram is not None:
            assert sum(one.histogram.counts) == np.prod(one.shape)
            assert one.shape == list(dict(model.named_modules())[one.layer].weight.shape)


@torch.no_grad()
def test_examples_are_the_inputs_that_change_most(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, inputs = hostile(), torch.randn(40, 3, 8, 8)
    result = search_ptq(model, inputs, small_space(2), QUICK, run_dir=tmp_path, report_images=3)
    quantized, part = result.quantized(), split(40, QUICK.parts, 0)[1]
    each = {k: float(KLDivergence()(quantized(inputs[[k]]), model(inputs[[k]]))) for k in part}
    record = RunRecord.load(tmp_path)
    assert record is not None
    wanted = sorted(each, key=lambda k: -each[k])[:3]
    assert [example.index for example in record.examples] == wanted
    for example in record.examples:
        assert example.distance == pytest.approx(each[example.index], rel=1e-4)
        for name, network in (("float", model), ("searched", quantized)):
            p = torch.softmax(network(inputs[[example.index]])[0], 0)
            assert example.answers[name].best == int(p.argmax())
            assert example.answers[name].probability == pytest.approx(float(p.max()), rel=1e-3)
        assert pixels(example.pictures["input"]).shape == (8, 8, 3)


@torch.no_grad()
def test_pieces_of_pictures_lie_where_they_differ_most(enlarged: Path) -> None:
    record = RunRecord.load(enlarged)
    assert record is not None and record.pictures and len(record.examples) == 3
    torch.manual_seed(6)
    model, inputs = Doubler(), torch.rand(20, 3, 16, 16)
    example, quantized = record.examples[0], apply_strategy(model, load(enlarged))
    wanted, found = (network(inputs[[example.index]])[0] for network in (model, quantized))
    assert next(iter(example.pictures)) == "input" and list(example.pictures)[-1] == "difference"
    # Small enough to be there whole: black and white are the float network's extremes.
    low, high = wanted.min(), wanted.max()
    scaled = ((found - low) / (high - low)).clamp(0, 1).permute(1, 2, 0)
    assert np.abs(pixels(example.pictures["searched"]) / 255 - scaled.numpy()).max() < 0.01
    assert pixels(example.pictures["input"]).shape == (16, 16, 3)


def test_pieces_of_pictures_are_files_too(enlarged: Path, run: Path) -> None:
    record = RunRecord.load(enlarged)
    assert record is not None
    wanted = {
        f"{number}_{name.replace(' ', '_')}.png": pixels(uri)
        for number, example in enumerate(record.examples)
        for name, uri in example.pictures.items()
    }
    assert {"0_input.png", "0_bicubic.png", "0_float.png", "0_searched.png"} <= set(wanted)
    files = {file.name: np.asarray(Image.open(file)) for file in (enlarged / "pictures").iterdir()}
    assert files.keys() == wanted.keys()
    assert all((files[name] == wanted[name]).all() for name in wanted)
    # A classifier's inputs are thumbnails of a page, and no results.
    assert not (run / "pictures").exists()


def test_outputs_stand_between_bicubic_and_original() -> None:
    source, target = torch.rand(3, 8, 9), torch.rand(1, 3, 16, 18)
    outputs = {FLOAT: torch.rand(3, 16, 18), SEARCHED: torch.rand(3, 16, 18)}
    found = framed(source, outputs, target)
    assert list(found) == ["bicubic", FLOAT, SEARCHED, "original"]
    assert torch.equal(found["bicubic"], resize(source, 16, 18)) and torch.equal(found["original"], target[0])
    assert list(framed(source, outputs, None)) == ["bicubic", FLOAT, SEARCHED]
    same = {FLOAT: torch.rand(3, 8, 9)}
    assert framed(source, same, None) == same  # nothing was enlarged


def test_the_worst_window_against_all_windows() -> None:
    error = torch.rand(23, 31)
    found = worst_corner(error, (8, 12), 4)
    sums = {
        (row, column): float(error[row : row + 8, column : column + 12].sum())
        for row in range(0, 23 - 8 + 1, 4)
        for column in range(0, 31 - 12 + 1, 4)
    }
    assert found == max(sums, key=sums.__getitem__)


def test_crops_of_a_large_picture_are_one_piece() -> None:
    source = torch.rand(3, 100, 90)
    wanted = nn.functional.interpolate(source[None], scale_factor=2)[0]
    found = wanted.clone()
    found[:, 150:158, 20:28] += 1.0
    pictures = crops(source, {"float": wanted, "searched": found}, "float", "searched")
    assert pixels(pictures["difference"]).shape == (128, 128, 3)
    bright = np.argwhere(pixels(pictures["difference"])[..., 0] == 255)
    assert np.ptp(bright, axis=0).tolist() == [7, 7]
    assert pixels(pictures["input"]).shape == (64, 64, 3)


def test_thumbnails_keep_their_shape_and_range() -> None:
    picture = torch.rand(1, 300, 150) * 7 - 3
    assert pixels(thumbnail(picture)).shape == (96, 48)
    wanted = ((picture[0] + 3) / 7 * 255).round().int()
    assert pixels(data_uri(picture, -3.0, 4.0)).tolist() == wanted.tolist()


def test_no_inputs_are_shown_where_none_are_wanted(tmp_path: Path) -> None:
    search_ptq(hostile(), torch.randn(20, 3, 8, 8), small_space(2), QUICK, run_dir=tmp_path, report_images=0)
    record = RunRecord.load(tmp_path)
    assert record is not None and record.examples == []
    assert "data:image" not in (tmp_path / "report.json").read_text()


def test_a_damaged_record_is_named(run: Path, tmp_path: Path) -> None:
    data = json.loads((run / "report.json").read_text())
    data["examples"][0]["pictures"] = {"input": "https://example.org/spy.png"}
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(StrategyError, match=r"report\.json: damaged"):
        RunRecord.load(tmp_path)
    assert RunRecord.load(tmp_path / "nowhere") is None
