"""A bundle gives back its tensors bit for bit, or is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqss.bundle import Bundle, load
from dqss.errors import OutputError, StrategyError
from dqss.spec import Candidate, PerChannel, QuantSpec
from dqss.strategy import LayerStrategy, ModelInfo, Strategy, TensorChoice

LAYER = "layer1.0.conv1"


def strategy(layers: dict[str, LayerStrategy] | None = None) -> Strategy:
    weight = TensorChoice.of(Candidate.of("mse", QuantSpec(4, True, PerChannel(0))), decision="w")
    activation = TensorChoice.of(Candidate.of("minmax", QuantSpec(4, False)), decision="a")
    return Strategy(
        dqss="0.1.0",
        created="2026-11-22T04:00:00Z",
        model=ModelInfo(source="own", name="net", weights_sha256="00", tensors={}, prepare=[]),
        search_space="uniform",
        method="ptq",
        seed=0,
        budget=None,
        layers={LAYER: LayerStrategy(weight=weight, activation=activation)} if layers is None else layers,
    )


def tensors() -> dict[str, Tensor]:
    return {
        f"{LAYER}.weight.scale": torch.tensor([0.1, 2.5e-30, 7.0]),
        f"{LAYER}.weight.zero_point": torch.zeros(3),
        f"{LAYER}.activation.scale": torch.tensor([0.3]),
        f"{LAYER}.activation.zero_point": torch.tensor([15.0]),
        "state.running_mean": torch.randn(2, 3, dtype=torch.float64),
        "state.codes": torch.tensor([[-8, 7]], dtype=torch.int8),
        "state.half": torch.randn(5).bfloat16(),
    }


def refusal(path: Path) -> str:
    with pytest.raises(StrategyError) as caught:
        load(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_round_trip_is_bit_exact_and_byte_stable(tmp_path: Path) -> None:
    given_tensors = tensors()
    written = Bundle(strategy(), given_tensors).save(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "strategy.json"):
        read = load(path)
        assert read.strategy == written.strategy
        assert read.tensors.keys() == given_tensors.keys()
        for key, tensor in given_tensors.items():
            assert read.tensors[key].dtype == tensor.dtype
            assert torch.equal(read.tensors[key], tensor)
    data = (tmp_path / "run" / "tensors.safetensors").read_bytes()
    assert read.strategy.tensors_sha256 == hashlib.sha256(data).hexdigest()
    assert sorted(os.listdir(tmp_path / "run")) == ["strategy.json", "tensors.safetensors"]

    Bundle(strategy(), dict(reversed(given_tensors.items()))).save(tmp_path / "again")
    for name in os.listdir(tmp_path / "run"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_views_and_shared_memory_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    shared = {
        "state.a": base,
        "state.b": base,
        "state.t": base.T,
        "state.grad": base.clone().requires_grad_(),
    }
    Bundle(strategy({}), shared).save(tmp_path)
    read = load(tmp_path).tensors
    assert all(torch.equal(read[key], shared[key]) for key in shared)


def test_a_float_strategy_needs_no_tensors(tmp_path: Path) -> None:
    Bundle(strategy({"fc": LayerStrategy(weight=None, activation=None)}), {}).save(tmp_path)
    assert load(tmp_path).tensors == {}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    Bundle(strategy(), tensors()).save(tmp_path)
    for name in ("tensors.safetensors", "strategy.json"):
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole), 50):
            (tmp_path / name).write_bytes(whole[:size])
            assert name in refusal(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert load(tmp_path).strategy.layers == strategy().layers


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in refusal(tmp_path / "absent")
    for name in ("tensors.safetensors", "strategy.json"):
        Bundle(strategy(), tensors()).save(tmp_path)
        (tmp_path / name).unlink()
        assert str(tmp_path / name) in refusal(tmp_path)


def test_files_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    Bundle(strategy(), tensors()).save(tmp_path / "a")
    Bundle(strategy(), tensors() | {f"{LAYER}.activation.scale": torch.tensor([0.31])}).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "tensors.safetensors", tmp_path / "a" / "tensors.safetensors")
    assert "do not belong together" in refusal(tmp_path / "a")


def test_a_strategy_that_records_no_tensors_is_refused(tmp_path: Path) -> None:
    Bundle(strategy(), tensors()).save(tmp_path)
    (tmp_path / "strategy.json").write_text(strategy().to_json())
    assert "tensors.safetensors" in refusal(tmp_path)


def test_edited_bits_no_longer_fit_the_tensors(tmp_path: Path) -> None:
    Bundle(strategy(), tensors()).save(tmp_path)
    file = tmp_path / "strategy.json"
    data = json.loads(file.read_text())
    data["layers"][LAYER]["activation"]["bits"] = 3
    file.write_text(json.dumps(data))
    message = refusal(tmp_path)
    assert f"{LAYER}.activation.zero_point" in message
    assert "integers in 0..7" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight.scale", None, "missing"),
        ("weight.zero_point", None, "missing"),
        ("activation.scale", None, "missing"),
        ("activation.zero_point", None, "missing"),
        ("weight.scale", torch.ones(3, dtype=torch.float64), "expected fp32"),
        ("weight.scale", torch.ones(3, 1), "expected fp32"),
        ("weight.scale", torch.ones(0), "expected fp32"),
        ("weight.scale", torch.ones(4), "3 values for 4 scales"),
        ("weight.scale", torch.tensor([1.0, 0.0, 1.0]), "above zero"),
        ("weight.scale", torch.tensor([1.0, float("inf"), 1.0]), "finite"),
        ("weight.scale", torch.tensor([1.0, float("nan"), 1.0]), "finite"),
        ("weight.zero_point", torch.tensor([0.0, 1.0, 0.0]), "0..0"),
        ("activation.scale", torch.ones(2), "one value per tensor"),
        ("activation.zero_point", torch.tensor([0.5]), "integers"),
        ("activation.zero_point", torch.tensor([16.0]), "0..15"),
        ("activation.zero_point", torch.tensor([float("nan")]), "integers"),
    ],
)
def test_tensors_that_do_not_fit_name_their_layer(key: str, value: Tensor | None, message: str) -> None:
    wrong = tensors()
    if value is None:
        del wrong[f"{LAYER}.{key}"]
    else:
        wrong[f"{LAYER}.{key}"] = value
    with pytest.raises(StrategyError) as caught:
        Bundle(strategy(), wrong)
    assert f"'{LAYER}.{key.split('.')[0]}." in str(caught.value)
    assert message in str(caught.value)


def with_tensors_file(folder: Path, data: bytes) -> None:
    """Write a run whose strategy records ``data``, whatever that is."""
    (folder / "tensors.safetensors").write_bytes(data)
    recorded = strategy().model_copy(update={"tensors_sha256": hashlib.sha256(data).hexdigest()})
    (folder / "strategy.json").write_text(recorded.to_json())


def forged(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x04.",
        struct.pack("<Q", 2**62),
        forged(b"{"),
        forged([]),
        forged({"x": {}}),
        forged({"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}),
        forged({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}}),
        forged({"x": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        forged({"x": {"dtype": "XX", "shape": [16], "data_offsets": [0, 64]}}),
        forged({"x": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}}),
        forged({"x": {"dtype": "F8_E8M0", "shape": [64], "data_offsets": [0, 64]}}),
        forged({"x": {"dtype": "F6_E2M3", "shape": [64], "data_offsets": [0, 48]}}),
    ],
)
def test_a_forged_tensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with_tensors_file(tmp_path, data)
    assert "tensors.safetensors" in refusal(tmp_path)


@given(st.integers(0), st.binary(min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
def test_changed_header_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, patch: bytes
) -> None:
    folder = tmp_path_factory.mktemp("forged")
    data = bytearray(safetensors.torch.save(tensors()))
    (header,) = struct.unpack("<Q", data[:8])
    start = position % (header + 8)
    data[start : start + len(patch)] = patch
    with_tensors_file(folder, bytes(data))
    try:
        load(folder)
    except StrategyError as error:
        assert str(error).isprintable()


def test_output_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="is a file"):
            Bundle(strategy(), tensors()).save(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_save_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bundle(strategy(), tensors()).save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:  # the tensors are staged, the strategy does not fit any more
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"strategy\.json.*No space left on device; free some space"):
        Bundle(strategy(), tensors() | {"state.more": torch.ones(9)}).save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
