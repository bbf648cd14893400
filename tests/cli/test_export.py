"""``python -m dqss.export`` writes a file that answers as the search's network does, or says why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import dqss
from dqss.arithmetic import ONNXRUNTIME
from dqss.data.digits import Digits
from dqss.models.factory import DIGITS_INPUT, digits_resnet20
from tests.cli.runner import TINY, call


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a search at eight bits, for a target."""
    folder = tmp_path_factory.mktemp("integer") / "run"
    bits = ("search_space.weight_bits=8", "search_space.activation_bits=8", "method.oracle=false")
    words = (*TINY, *bits, "target=onnxruntime-cpu", f"run_dir={folder}")
    outcome = call("search", *words, cwd=folder.parent)
    assert outcome.code == 0, outcome.err
    return folder


def test_the_file_answers_as_the_simulation(integer: Path, tmp_path: Path) -> None:
    words = (f"strategy={integer}", "run_dir=out", "target=onnxruntime-cpu", "images=100", "debug=true")
    outcome = call("export", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir() if entry.suffix != ".log") == [
        ".hydra", "export.json", "model.onnx",
    ]  # fmt: skip
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["parity"]["count"] == 100 and report["kernels"]["integer"]["QLinearConv"] > 0
    assert report["metric"]["simulation"] == pytest.approx(report["metric"]["onnxruntime"], abs=0.011)
    for part in report["parity"]["parts"][:-1]:
        assert part["part"] in outcome.out.replace("\n", " ") or len(part["part"]) > 30
    assert "layer by layer: at most" in outcome.out and "convolutions and matrix products" in outcome.out
    data = Digits()
    data.configure(DIGITS_INPUT, 10)
    loader = data.val_dataloader()
    assert loader is not None
    images = next(iter(loader))[0][:50]
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        wanted = dqss.apply_strategy(digits_resnet20().module, dqss.load(integer))(images).numpy()
        integers = dqss.apply_strategy(digits_resnet20().module, dqss.load(integer), arithmetic=ONNXRUNTIME)(
            images
        ).numpy()
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    assert np.array_equal(found, integers) and report["parity"]["arithmetic"] == str(ONNXRUNTIME)


def test_it_is_measured_in_the_integers_of_a_target(integer: Path, finished: Path, tmp_path: Path) -> None:
    words = (f"strategy={integer}", "run_dir=out", "target=onnxruntime-cpu")
    assert call("evaluate", *words, cwd=tmp_path).code == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["searched"]["validation"]
    model, bundle, data = digits_resnet20().module, dqss.load(integer), Digits()
    data.configure(DIGITS_INPUT, 10)
    loader = data.val_dataloader()
    assert loader is not None
    images = torch.cat([images for images, _ in loader])
    with torch.no_grad():
        outputs = (model.eval()(images), dqss.apply_strategy(model, bundle, arithmetic=ONNXRUNTIME)(images))
        wanted, logs = (torch.log_softmax(output, 1) for output in outputs)
    kl = torch.nn.functional.kl_div(logs, wanted, reduction="batchmean", log_target=True)
    assert found["distance"] == pytest.approx(float(kl), rel=1e-4)
    searched = json.loads((integer / "metrics.json").read_text())["searched"]["validation"]["distance"]
    assert abs(searched - float(kl)) > 1e-3 * float(kl)
    strategy = f"strategy={finished}"
    error = call("evaluate", strategy, "target=onnxruntime-cpu", cwd=tmp_path).error
    assert "target 'onnxruntime-cpu' has no activations as" in error
    assert "expected one of" in call("evaluate", strategy, "target=onnx", cwd=tmp_path).error
    plain = tmp_path / "plain"
    bits = ("search_space.weight_bits=8", "search_space.activation_bits=8", "method.oracle=false")
    assert call("search", *TINY, *bits, f"run_dir={plain}", cwd=tmp_path).code == 0
    error = call("evaluate", f"strategy={plain}", "target=onnxruntime-cpu", cwd=tmp_path).error
    assert "target=onnxruntime-cpu: the strategy has no points" in error and "search with target=" in error


def test_a_program_of_torch(integer: Path, tmp_path: Path) -> None:
    outcome = call("export", f"strategy={integer}", "run_dir=out", "format=torch", "images=50", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "torch model in" in outcome.out and "end to end: relative error 0 " in outcome.out
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["metric"]["simulation"] == report["metric"]["torch"]
    assert report["parity"]["count"] == 50 and report["bytes"]["file"] > 0
    images = torch.randn(3, *DIGITS_INPUT.size)
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        wanted = dqss.apply_strategy(digits_resnet20().module, dqss.load(integer))(images)
        assert torch.equal(program(images)[0], wanted)


def test_narrow_grids_and_a_file_of_ones_own(finished: Path, tmp_path: Path) -> None:
    words = (f"strategy={finished / 'strategy.json'}", f"file={tmp_path / 'mine.onnx'}", "images=20")
    outcome = call("export", *words, "run_dir=out", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "weights: 20 of 2 bits as int4" in outcome.out and "20 activations clipped" in outcome.out
    onnx.checker.check_model(str(tmp_path / "mine.onnx"), full_check=True)
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["target=tensorrtt"], "target=tensorrtt (did you mean 'tensorrt'?): expected one of generic"),
        (["target=onnxruntime-cpu"], "conv1.activation: target 'onnxruntime-cpu' has no activations as"),
        (["target=tensorrt", "exact=true"], "exact=true is for target=generic"),
        (["format=tflite"], "format=tflite: expected one of onnx, torch"),
        (
            ["format=torch", "target=tensorrt"],
            "target=tensorrt is for format=onnx",
        ),
        (["images=0"], "images=0: expected 1 or more, or null"),
        (["images=some"], "images=some: expected a whole number or null"),
        (["tolerance.shares=1"], "tolerance.shares: unknown option (did you mean 'share'?)"),
        (["tolerance.share=some"], "tolerance.share=some: expected a number"),
        (["tolerance.output=-1"], "differs from the simulation at the output, computed by linear"),
        (["tolerance.agreement=1.5"], "although every layer alone agrees"),
        (["model=resnet56"], "the strategy is for another model"),
        (["debugg=true"], "debugg: unknown option"),
    ],
)
def test_bad_input(finished: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    error = call("export", f"strategy={finished}", "run_dir=out", "images=8", *words, cwd=tmp_path).error
    assert expected in error
    assert not list(tmp_path.rglob("*.onnx")) and not list(tmp_path.rglob("*.tmp"))


def test_no_strategy_there(finished: Path, tmp_path: Path) -> None:
    assert "strategy is not given" in call("export", cwd=tmp_path).error
    assert "no such file" in call("export", "strategy=nowhere", cwd=tmp_path).error.lower()
    copied = Path(shutil.copytree(finished, tmp_path / "copied"))
    (copied / "strategy.json").write_text("{}")
    assert "schema_version: missing" in call("export", f"strategy={copied}", cwd=tmp_path).error


def test_a_search_for_a_target_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    words = (*TINY, "run_dir=out", "target=onnxruntime-cpu")
    error = call("search", *words, cwd=tmp_path).error
    assert "search space 'uniform': target 'onnxruntime-cpu' has no activations as 'minmax@2" in error
    assert not (tmp_path / "out" / "strategy.json").exists()
    error = call("search", *words, "target=onnx", cwd=tmp_path).error
    assert "target=onnx" in error and "expected one of generic, onnxruntime-cpu, tensorrt" in error
