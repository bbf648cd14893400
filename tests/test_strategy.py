"""A strategy file reads back exactly, or is refused in one line that names the field."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dqss.strategy
from dqss.choice import OPERANDS
from dqss.errors import StrategyError
from dqss.schema import json_schema
from dqss.spec import (
    MAX_BITS,
    MIN_BITS,
    Candidate,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
)
from dqss.strategy import LayerStrategy, ModelInfo, ProductStrategy, Strategy, TensorChoice, utc_now

REPOSITORY = Path(dqss.strategy.__file__).parents[1]

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=12)
free = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | finite | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
schemes = st.sampled_from([(True, True), (True, False), (False, True)])
axes = st.integers(-4, 4)
tensor_or_channel = st.just(PerTensor()) | st.builds(PerChannel, axes)
groups = st.builds(PerGroup, st.integers(1, 256), axes)


def candidates_of(granularities: st.SearchStrategy[Granularity]) -> st.SearchStrategy[Candidate]:
    specs = st.tuples(st.integers(MIN_BITS, MAX_BITS), schemes, granularities).map(
        lambda drawn: QuantSpec(drawn[0], drawn[1][0], drawn[2], drawn[1][1])
    )
    return st.builds(Candidate.of, names, specs, st.dictionaries(st.text(max_size=6), finite, max_size=3))


candidates = candidates_of(tensor_or_channel | groups)


def choices_of(granularities: st.SearchStrategy[Granularity]) -> st.SearchStrategy[TensorChoice]:
    return st.builds(
        TensorChoice.of,
        candidates_of(granularities),
        probability=st.none() | st.floats(0, 1),
        margin=st.none() | finite,
        decision=names,
    )


layer_strategies = st.builds(
    LayerStrategy,
    weight=st.none() | choices_of(tensor_or_channel | groups),
    activation=st.none() | choices_of(tensor_or_channel),
)
product_strategies = st.sampled_from(list(OPERANDS)).flatmap(
    lambda kind: st.builds(
        ProductStrategy,
        kind=st.just(kind),
        operands=st.dictionaries(st.sampled_from(OPERANDS[kind]), choices_of(st.just(PerTensor()))),
    )
)
strategies = st.builds(
    Strategy,
    dqss=st.text(max_size=8),
    created=st.datetimes().map(lambda t: t.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")),
    model=st.builds(
        ModelInfo,
        source=st.text(max_size=8),
        name=st.text(max_size=8),
        weights_sha256=st.text(max_size=64),
        tensors=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
        prepare=st.lists(st.text(max_size=8), max_size=3),
        input=free,
    ),
    search_space=st.text(max_size=8),
    method=st.text(max_size=8),
    seed=st.integers(),
    budget=st.none() | free,
    tensors_sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    layers=st.dictionaries(st.text(max_size=12), layer_strategies, max_size=4),
    products=st.dictionaries(st.text(max_size=12), product_strategies, max_size=3),
    blocks=free,
    ties=st.lists(st.lists(st.text(max_size=6), max_size=3), max_size=2),
    metrics=free,
)


def example() -> Strategy:
    weight = TensorChoice.of(
        Candidate.of("mse", QuantSpec(4, True, PerChannel(0))),
        probability=0.71,
        margin=0.48,
        decision="layer1.0.conv1.weight",
    )
    activation = TensorChoice.of(
        Candidate.of("percentile", QuantSpec(4, False), {"p": 99.99}),
        probability=0.62,
        margin=0.31,
        decision="layer1.0.conv1.activation",
    )
    return Strategy(
        dqss="0.1.0",
        created="2026-11-22T04:00:00Z",
        model=ModelInfo(
            source="timm",
            name="resnet18",
            weights_sha256="ab" * 32,
            tensors={"conv1.weight": "cd" * 4},
            prepare=["fold_batch_norm"],
        ),
        search_space="uniform",
        method="ptq",
        seed=0,
        budget=None,
        layers={
            "layer1.0.conv1": LayerStrategy(weight=weight, activation=activation),
            "naïve\nname\x1b[0m": LayerStrategy(weight=weight, activation=None),
        },
        products={
            "blocks.0.product1": ProductStrategy(kind="matmul", operands={"left": activation}),
            "blocks.1.product0": ProductStrategy(kind="attention", operands={"probabilities": activation}),
        },
        ties=[["a.weight", "b.weight"]],
        metrics={"searched": {"kl": 0.1}},
    )


def refusal(data: Any) -> str:
    """The one line that refuses ``data``."""
    with pytest.raises(StrategyError) as caught:
        Strategy.parse(data if isinstance(data, str) else json.dumps(data), "run/strategy.json")
    message = str(caught.value)
    assert message.isprintable(), message  # so one line, and harmless on a terminal
    assert message.startswith("run/strategy.json: ")
    return message


@given(strategies)
@settings(deadline=None, max_examples=60)
def test_round_trip_is_exact_and_byte_stable(strategy: Strategy) -> None:
    text = strategy.to_json()
    again = Strategy.parse(text)
    assert again == strategy
    assert list(again.layers) == list(strategy.layers)
    assert again.to_json() == text
    assert text.encode("ascii").endswith(b"}\n")


@given(candidates)
@settings(deadline=None)
def test_candidate_round_trip(candidate: Candidate) -> None:
    assert TensorChoice.of(candidate, decision="d").candidate() == candidate


def test_file_says_what_design_says() -> None:
    data = json.loads(example().to_json())
    assert data["schema_version"] == 1
    assert data["layers"]["layer1.0.conv1"]["weight"] == {
        "algorithm": "mse",
        "params": {},
        "bits": 4,
        "symmetric": True,
        "signed": True,
        "granularity": {"type": "per_channel", "axis": 0},
        "probability": 0.71,
        "margin": 0.48,
        "decision": "layer1.0.conv1.weight",
        "tuned": False,
    }
    assert data["layers"]["layer1.0.conv1"]["activation"]["granularity"] == {"type": "per_tensor"}


def test_choices_are_the_quantized_tensors_in_order() -> None:
    strategy = example()
    first, second = strategy.layers.values()
    assert list(strategy.choices()) == [
        ("layer1.0.conv1", "weight", first.weight),
        ("layer1.0.conv1", "activation", first.activation),
        ("naïve\nname\x1b[0m", "weight", second.weight),
        ("blocks.0.product1", "left", first.activation),
        ("blocks.1.product0", "probabilities", first.activation),
    ]


def test_measured_infinity_becomes_null() -> None:
    data = example().model_dump() | {"metrics": {"psnr": math.inf, "rows": [{"kl": math.nan}, 1.5]}}
    strategy = Strategy.model_validate(data)
    assert strategy.metrics == {"psnr": None, "rows": [{"kl": None}, 1.5]}
    assert Strategy.parse(strategy.to_json()) == strategy


def test_rounded_probability_sum_is_accepted_and_no_more() -> None:
    candidate = Candidate.of("mse", QuantSpec(4, True))
    assert TensorChoice.of(candidate, probability=1.0 + 1e-7, decision="d").probability == 1.0
    with pytest.raises(ValueError, match="probability"):
        TensorChoice.of(candidate, probability=1.1, decision="d")


def test_utc_now_is_the_time() -> None:
    then = datetime.strptime(utc_now(), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - then).total_seconds()) < 5
    assert Strategy.model_validate(example().model_dump() | {"created": utc_now()})


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = example().to_json().encode()
    file = tmp_path / "strategy.json"
    for size in [*range(0, len(data), 50), len(data) - 2]:
        file.write_bytes(data[:size])
        with pytest.raises(StrategyError, match=r"no valid JSON at line \d+") as caught:
            Strategy.load(file)
        assert str(caught.value).startswith(str(file))
        assert str(caught.value).isprintable()


@given(st.integers(0), st.binary(min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_changed_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, patch: bytes
) -> None:
    data = bytearray(example().to_json().encode())
    start = position % len(data)
    data[start : start + len(patch)] = patch
    file = tmp_path_factory.mktemp("s") / "strategy.json"
    file.write_bytes(data)
    try:
        read = Strategy.load(file)
    except StrategyError as error:
        assert str(error).isprintable()
    else:
        assert Strategy.parse(read.to_json()) == read


FREE = ("blocks", "metrics", "budget", "input")


def fields(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every value whose type the format fixes."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        if key not in FREE:
            yield from fields(value, (*path, key))


def holder(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def shown(path: tuple[Any, ...]) -> str:
    """The path as messages show it: ``layers.conv1.weight.bits``."""
    return dqss.strategy.one_line(".".join(map(str, path)))


@pytest.mark.parametrize("path", list(fields(json.loads(example().to_json()))), ids=shown)
def test_every_field_refuses_a_wrong_type(path: tuple[Any, ...]) -> None:
    data = json.loads(example().to_json())
    holder(data, path)[path[-1]] = 3 if isinstance(holder(data, path)[path[-1]], str) else "wrong"
    assert f": {shown(path)}" in refusal(data)


OPTIONAL = {
    "params",
    "signed",
    "probability",
    "margin",
    "input",
    "tensors_sha256",
    "blocks",
    "products",
    "ties",
    "metrics",
    "tuned",
    "bias_corrected",
    "repair",
}


@pytest.mark.parametrize("path", list(fields(json.loads(example().to_json()))), ids=shown)
def test_missing_fields_are_named(path: tuple[Any, ...]) -> None:
    data = json.loads(example().to_json())
    del holder(data, path)[path[-1]]
    by_name = {"layers", "tensors", "params", "products", "operands"}
    by_name_or_index = isinstance(path[-1], int) or not by_name.isdisjoint(path[-2:-1])
    if by_name_or_index or path[-1] in OPTIONAL:
        Strategy.parse(json.dumps(data))
    elif path[-1] == "type":
        assert f"{shown(path[:-1])}: " in refusal(data)
    else:
        assert f": {shown(path)}: missing" in refusal(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("bits", 99, "expected less than or equal to 16, got 99"),
        ("bits", 1, "expected greater than or equal to 2, got 1"),
        ("bits", "4", "expected a valid integer, got '4'"),
        ("bits", True, "expected a valid integer, got True"),
        ("symmetric", 1, "expected a valid boolean, got 1"),
        ("probability", 1.5, "expected less than or equal to 1, got 1.5"),
        ("algorithm", "", "string should have at least 1 character, got ''"),
        ("bit", 4, "unknown field (did you mean 'bits'?)"),
        (
            "granularity",
            {"type": "per_chanel", "axis": 0},
            ".type: expected 'per_tensor', 'per_channel', 'per_group', got 'per_chanel'",
        ),
        ("granularity", {"axis": 0}, "expected an object with a 'type', got {'axis': 0}"),
        ("granularity", {"type": "per_tensor", "axis": 0}, ".axis: unknown field"),
        ("granularity", {"type": "per_channel", "axis": 0.5}, ".axis: expected a valid integer"),
        ("granularity", {"type": "per_group"}, ".size: missing"),
        (
            "granularity",
            {"type": "per_group", "size": 0},
            ".size: expected greater than or equal to 1",
        ),
        ("signed", 0, "expected a valid boolean, got 0"),
        ("params", {"p": "99"}, ".p: expected a valid number, got '99'"),
    ],
)
def test_edited_choice_is_refused_by_field(path: str, value: Any, message: str) -> None:
    data = json.loads(example().to_json())
    data["layers"]["layer1.0.conv1"]["weight"][path] = value
    line = refusal(data)
    assert f": layers.layer1.0.conv1.weight.{path}" in line
    assert message in line
    assert "search again" in line


def test_files_from_before_there_were_unsigned_grids_still_read() -> None:
    data = json.loads(example().to_json())
    assert data["layers"]["layer1.0.conv1"]["weight"].pop("signed") is True
    assert data["layers"]["layer1.0.conv1"]["activation"].pop("signed") is True
    data["layers"]["layer1.0.conv1"]["weight"]["granularity"] = {"type": "per_group", "size": 32}
    read = Strategy.parse(json.dumps(data)).layers["layer1.0.conv1"]
    assert read.weight is not None and read.activation == example().layers["layer1.0.conv1"].activation
    assert read.weight.candidate() == Candidate.of("mse", QuantSpec(4, True, PerGroup(32, 0)))


def test_files_from_before_there_were_products_still_read() -> None:
    data = json.loads(example().to_json())
    assert len(data.pop("products")) == 2
    assert Strategy.parse(json.dumps(data)).products == {}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bmm", {}, "kind: expected 'matmul' or 'attention', got 'bmm'"),
        ("attention", {}, "operand 'left': attention has query, key, probabilities, value"),
        ("matmul", {"granularity": {"type": "per_channel", "axis": 1}}, "quantized per_tensor"),
        ("matmul", {"bits": 1}, "operands.left.bits: expected greater than or equal to 2, got 1"),
    ],
)
def test_products_that_cannot_be_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    data = json.loads(example().to_json())
    data["products"]["blocks.0.product1"]["kind"] = kind
    data["products"]["blocks.0.product1"]["operands"]["left"] |= change
    line = refusal(data)
    assert ": products.blocks.0.product1" in line and message in line


def test_grids_that_cannot_be_are_refused() -> None:
    data = json.loads(example().to_json())
    data["layers"]["layer1.0.conv1"]["activation"]["signed"] = False
    assert "conv1.activation: signed is false, which only a symmetric grid can be" in refusal(data)
    data = json.loads(example().to_json())
    data["layers"]["layer1.0.conv1"]["activation"]["granularity"] = {"type": "per_group", "size": 32}
    assert "conv1.activation: per_group is for weights" in refusal(data)


def test_overflowing_and_foreign_numbers_are_refused() -> None:
    text = example().to_json()
    assert "finite" in refusal(text.replace("99.99", "1e999"))
    assert "NaN is not a JSON number" in refusal(text.replace("99.99", "NaN"))
    assert "no valid JSON" in refusal(text.replace("99.99", "9" * 5000 + "x"))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{}", "{} {}"])
def test_what_is_no_strategy_is_refused(text: str) -> None:
    assert "restore it or search again" in refusal(text)


def test_deep_nesting_is_refused() -> None:
    assert "nested too deeply" in refusal("[" * 200_000)
    deep = "[" * 900 + "]" * 900
    text = example().to_json().replace('"searched": {', f'"deep": {deep}, "searched": {{')
    assert ": metrics: nested too deeply" in refusal(text)


def test_a_key_given_twice_is_refused() -> None:
    text = example().to_json().replace('"seed": 0', '"seed": 0, "seed": 1')
    assert "'seed' appears twice" in refusal(text)


def test_newer_version_is_refused_before_its_fields() -> None:
    newer = {"schema_version": 2, "dqss": "7.1", "layers": "something else by then"}
    line = refusal(newer)
    assert "written by dqss 7.1, schema 2; this dqss reads schema 1: upgrade dqss" in line


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_other_versions_are_refused(version: Any) -> None:
    data = json.loads(example().to_json()) | {"schema_version": version}
    assert ": schema_version: expected 1, got " in refusal(data)


def test_load_takes_a_run_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "strategy.json").write_text(example().to_json())
    assert Strategy.load(tmp_path) == Strategy.load(str(tmp_path / "strategy.json")) == example()
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + example().to_json().encode())
    assert Strategy.load(tmp_path / "bom.json") == example()


def test_load_refuses_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"{\xff}")
    (tmp_path / "strategy.json").mkdir()
    for path, reason in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.json" / "x", "Not a directory"),
        (tmp_path / "binary.json", "no UTF-8 text at byte 1"),
    ):
        with pytest.raises(StrategyError, match=reason) as caught:
            Strategy.load(path)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()


def test_strategies_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        example().seed = 1


@given(strategies)
@settings(deadline=None, max_examples=40)
def test_schema_accepts_what_is_written(strategy: Strategy) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(json.loads(strategy.to_json()), json_schema())


def test_schema_refuses_what_the_parser_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.validators.validator_for(json_schema())(json_schema())
    original = json.loads(example().to_json())
    validator.check_schema(json_schema())
    for path in fields(original):
        data = copy.deepcopy(original)
        holder(data, path)[path[-1]] = 3 if isinstance(holder(data, path)[path[-1]], str) else "wrong"
        assert not validator.is_valid(data), path


def references(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_schema_is_printed_and_closed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dqss.schema"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    schema = json.loads(done.stdout)
    for node in references(schema):
        if "properties" in node and "additionalProperties" in node:
            assert node["additionalProperties"] is False
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
    bits = schema["$defs"]["TensorChoice"]["properties"]["bits"]
    assert (bits["minimum"], bits["maximum"]) == (MIN_BITS, MAX_BITS)


def test_reading_a_strategy_needs_no_torch() -> None:
    code = "import sys, dqss.strategy, dqss.schema; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    assert done.stdout == "False\n"
