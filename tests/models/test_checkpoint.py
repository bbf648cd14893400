"""Weights go in whole, or not at all with one line that says why; code in files never runs."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dqss.errors import ModelError
from dqss.models.checkpoint import load_checkpoint


def network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, classes))


def trained() -> dict[str, Tensor]:
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value + 5
        for key, value in network().state_dict().items()
    }


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key]), key


def refused(path: Path, match: str, model: nn.Module | None = None, **options: Any) -> str:
    model = model or network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=match) as caught:
        load_checkpoint(model, path, what="net", **options)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "partly loaded"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "model._orig_mod.", "module.model."]
)
def test_wrappings_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = trained()
    content: Any = {prefix + key: value for key, value in state.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "net.pth")
    model = network()
    load_checkpoint(model, tmp_path / "net.pth", what="net")
    assert_loaded(model, state)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    state = trained()
    raw = {key: value + 1 for key, value in state.items()}
    torch.save({"state_dict": raw, "state_dict_ema": state}, tmp_path / "net.ckpt")
    model = network()
    load_checkpoint(model, tmp_path / "net.ckpt", what="net")
    assert_loaded(model, state)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    own = nn.Module()
    own.model = network()
    state = {f"model.{key}": value for key, value in trained().items()}
    torch.save(state, tmp_path / "net.pt")
    load_checkpoint(own, tmp_path / "net.pt", what="net")
    assert_loaded(own, state)


def test_safetensors_and_files_without_batch_counters(tmp_path: Path) -> None:
    state = {key: value for key, value in trained().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "net.safetensors")
    model = network()
    load_checkpoint(model, tmp_path / "net.safetensors", what="net")
    assert_loaded(model, state)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".th", ".pt", ".ckpt", ".bin"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, suffix: str, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    content = {"state_dict": trained(), "extra": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refused(path, "holds Python objects besides tensors, which were not run")
    assert not marker.exists() and "safetensors" in message
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload of this test does not work"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_pickle_is_never_run(tmp_path: Path, suffix: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps(Payload(marker)))
    refused(path, "not run|damaged")
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload of this test does not work"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "net.pt")
    refused(tmp_path / "net.pt", "pt holds Python objects")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(trained(), buffer)
    whole = buffer.getvalue()
    save_file(trained(), tmp_path / "whole.safetensors")
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    cases = {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "noise.pth": bytes(range(256)) * 8,
        "text.pth": b"<html>404 not found</html>",
        "cut.safetensors": tensors[: len(tensors) // 2],
        "empty.safetensors": b"",
        "pth.safetensors": whole,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(tmp_path / name, "damaged")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    refused(tmp_path / "zip.pth", "damaged")


def test_places_and_kinds_that_are_not_checkpoints(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pth", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "net.onnx").write_bytes(b"x")
    refused(tmp_path / "net.onnx", "expected .safetensors")
    for content in ({}, {"epoch": 3}, [1, 2], {"state_dict": {"epoch": 3}}):
        torch.save(content, tmp_path / "none.pth")
        refused(tmp_path / "none.pth", "no named tensors")
    torch.save(torch.ones(3), tmp_path / "bare.pth")
    refused(tmp_path / "bare.pth", "no named tensors")


def test_keys_and_shapes_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    state = trained()
    state["extra.weight"] = torch.ones(1)
    del state["1.bias"]
    state["3.weight"], state["3.bias"] = torch.ones(5, 8), torch.ones(5)
    torch.save(state, tmp_path / "net.pth")
    message = refused(tmp_path / "net.pth", "does not fit net")
    for part in (
        "1 missing: 1.bias",
        "1 unexpected: extra.weight",
        "2 of another shape: 3.weight ([5, 8] in the file, [3, 8] in the model)",
        "model.num_classes",
    ):
        assert part in message
    torch.save({f"a{i}": torch.ones(1) for i in range(9)}, tmp_path / "net.pth")
    assert "9 unexpected: a0, a1, a2, ..." in refused(tmp_path / "net.pth", "does not fit")


def test_other_names_in_the_same_order_load_only_when_asked(tmp_path: Path) -> None:
    state = trained()
    renamed = {f"stem.{number}": value for number, value in enumerate(state.values())}
    save_file({key: value for key, value in renamed.items() if value.ndim}, tmp_path / "net.safetensors")
    torch.save({key: value for key, value in renamed.items() if value.ndim}, tmp_path / "net.pth")
    assert "checkpoint_mapping=order" in refused(tmp_path / "net.pth", "does not fit")
    model = network()
    load_checkpoint(model, tmp_path / "net.pth", what="net", mapping="order")
    assert_loaded(model, state)


def test_order_is_refused_where_shapes_or_numbers_differ(tmp_path: Path) -> None:
    state = {f"t{i}": v for i, v in enumerate(trained().values()) if v.ndim}
    torch.save(dict(list(state.items())[:-1]), tmp_path / "short.pth")
    refused(tmp_path / "short.pth", "7 tensors, net has 8", mapping="order")
    torch.save(dict(reversed(list(state.items()))), tmp_path / "turned.pth")
    refused(tmp_path / "turned.pth", r"would go to 0.weight \[2, 1, 3, 3\]", mapping="order")
    refused(tmp_path / "turned.pth", "did you mean 'order'", mapping="ordr")
