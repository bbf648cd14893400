"""Programs of torch: they compute what the simulation computes, and need nothing but torch."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.calls import call_model, tensors_in
from dqss.deploy import program as programs
from dqss.deploy.compared import Parity
from dqss.deploy.function import tensors_of
from dqss.deploy.tolerance import Tolerance
from dqss.errors import ExportError, ParityError
from dqss.space import SearchSpace
from tests.deploy.support import bundle_for
from tests.deploy.test_export import TRACED
from tests.support.nets import cnn, images, small_space
from tests.support.zoo import NETWORKS

MIXED = small_space(range(2, 9), ["mse"], products=True)

ELSEWHERE = """
import sys
sys.modules["dqss"] = None  # nobody can import it
import torch
try:
    import dqss
except ImportError:
    program = torch.export.load(sys.argv[1]).module()
    found = program(torch.load(sys.argv[2]))
    assert "dqss" not in {name.partition(".")[0] for name, module in sys.modules.items() if module}
    torch.save(found, sys.argv[3])
"""


@pytest.mark.parametrize("name", TRACED)
@torch.no_grad()
def test_networks_of_every_shape(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, MIXED, start=3)
    seen: list[Parity] = []
    report = dqss.export_program(model, bundle, tmp_path / "m.pt2", [inputs], watch=seen.append)
    assert seen == [report.parity]
    # Every call of every quantizer is a part, and none differs: the same arithmetic in the same order.
    names = {f"{n}.{role}" for n, role, _ in bundle.strategy.choices() if role != "weight"}
    assert {row.part.call[0] for row in report.parity.parts if row.part.call} == names
    assert max(row.largest for row in report.parity.parts) == 0.0
    if name == "convolutions":  # whose trace fixes how many inputs there are: one
        return
    wanted = list(tensors_in(call_model(apply_strategy(model, bundle), inputs)))
    found = torch.export.load(report.path).module()(*tensors_of(inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_it_runs_where_there_is_no_dqss(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, MIXED)
    dqss.export_program(model, bundle, tmp_path / "m.pt2", inputs)
    other = images(3)
    torch.save(other, tmp_path / "x.pt")
    words = [sys.executable, "-c", ELSEWHERE, *(str(tmp_path / n) for n in ("m.pt2", "x.pt", "y.pt"))]
    subprocess.run(words, cwd=tmp_path, check=True)
    with torch.no_grad():
        wanted = apply_strategy(model, bundle)(other)
    assert torch.equal(torch.load(tmp_path / "y.pt")[0], wanted)


def test_nothing_of_ours_and_of_the_users_is_in_it(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, inputs = cnn(), 1000 + images(8)
    dqss.export_program(model, bundle_for(model, inputs, MIXED), tmp_path / "m.pt2", inputs)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    assert b"dqss" not in contents and str(Path.home()).encode() not in contents
    assert inputs[:2].numpy().tobytes() not in contents
    (arguments, _) = torch.export.load(tmp_path / "m.pt2").example_inputs
    assert not arguments[0].any()


def test_weights_take_a_byte(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, inputs = nn.Sequential(nn.Flatten(), nn.Linear(108, 4000)).eval(), images(4)
    for options in ({}, {"weight_granularity": "group", "weight_group_size": 27}):
        bundle = bundle_for(model, inputs, small_space(8, ["minmax"], **options))
        report = dqss.export_program(model, bundle, tmp_path / "m.pt2", inputs)
        assert report.sizes.file < 1.3 * report.sizes.estimate < 0.4 * report.sizes.floating


class Again(nn.Module):
    """A block that is called twice, with a quantizer inside that is too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x)).flatten(1)


def test_every_call_is_a_part(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, inputs = Again().eval(), images(4)
    report = dqss.export_program(model, bundle_for(model, inputs, MIXED), tmp_path / "m.pt2", inputs)
    calls = [row.part.call for row in report.parity.parts]
    assert calls == [("block.0.activation", 0), ("block.0.activation", 1), None]


def test_other_answers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, MIXED)
    restore = programs._Restores.forward

    def wrong(self: Any, codes: Tensor) -> Tensor:
        return restore(self, codes) * (1.2 if codes.ndim == 4 and codes.shape[1] == 1 else 1.0)

    monkeypatch.setattr(programs._Restores, "forward", wrong)
    with pytest.raises(
        ParityError, match=r"^torch 2.* differs from the simulation at 6\.activation: by up to"
    ):
        dqss.export_program(model, bundle, tmp_path / "m.pt2", inputs)
    assert not list(tmp_path.iterdir())
    wide = Tolerance(steps=1000, share=1.0, noise=100.0, output=10.0)
    dqss.export_program(model, bundle, tmp_path / "m.pt2", inputs, tolerance=wide)


def test_what_cannot_be_traced_is_said(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.mean()) > -100 else x

    space: SearchSpace = small_space(8)
    model, inputs = Branches().eval(), images(4)
    with pytest.raises(ExportError, match=r"torch cannot trace .*the simulation runs without a trace"):
        dqss.export_program(model, bundle_for(model, inputs, space), tmp_path / "m.pt2", inputs)


def test_a_program_that_cannot_be_compared_part_by_part_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another release of torch names modules in another way."""
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, MIXED)
    monkeypatch.setattr(programs, "_ends", lambda graph, names: {})
    with pytest.raises(ExportError, match="release of torch"):
        dqss.export_program(model, bundle, tmp_path / "m.pt2", inputs)
    assert not (tmp_path / "m.pt2").exists()
