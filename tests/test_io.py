"""Whatever stops a write, the old file stays whole and the failure is one line."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dqss.io
from dqss.errors import OutputError
from dqss.io import (
    Journal,
    ensure_folder,
    json_text,
    write_bytes_atomic,
    write_files_atomic,
    write_json_atomic,
    write_text_atomic,
)

REPOSITORY = Path(dqss.io.__file__).parents[1]
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )


@pytest.mark.parametrize("data", [b"", b"a\r\nb\n\x00\xff", bytes(range(256)) * 5000])
def test_what_is_written_is_what_is_read(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "out"
    write_bytes_atomic(file, b"old")
    write_bytes_atomic(file, data)
    assert file.read_bytes() == data
    assert os.listdir(tmp_path) == ["out"]


def test_longest_file_name_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 255)
    write_text_atomic(file, "é\n")
    assert file.read_bytes() == "é\n".encode()


@posix_only
def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "out", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_to_the_bit(value: float) -> None:
    (read,) = json.loads(json_text([value]))
    assert struct.pack("d", read) == struct.pack("d", value)


def test_json_keeps_order_and_is_standard(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    write_json_atomic(file, {"b": (1, 2.5), "a": {"psnr": math.inf, "kl": [math.nan, -math.inf]}})
    text = file.read_text()
    assert text.endswith("}\n")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    data = json.loads(text, parse_constant=refuse)
    assert data == {"b": [1, 2.5], "a": {"psnr": None, "kl": [None, None]}}
    assert list(data) == ["b", "a"]


@pytest.mark.parametrize("below", ["out", "deep/er/out"])
def test_path_through_a_file(tmp_path: Path, below: str) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("mine")
    for action in (
        lambda: write_text_atomic(blocker / below, "x"),
        lambda: ensure_folder(blocker / below),
        lambda: Journal.open(blocker / below).put("k", {}),
    ):
        with pytest.raises(OutputError) as caught:
            action()
        message = str(caught.value)
        assert "\n" not in message
        assert str(blocker / below) in message
        assert f"{str(blocker)!r} is a file" in message
    assert blocker.read_text() == "mine"


def test_folder_that_is_a_file_or_a_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="it is a file"):
        ensure_folder(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_text_atomic(tmp_path / "folder", "x")
    with pytest.raises(OutputError, match="folder"):
        Journal.open(tmp_path / "folder")
    with pytest.raises(OutputError, match="No such file or directory"):
        write_text_atomic(tmp_path / "absent" / "out", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_ensure_folder_makes_parents_and_accepts_what_is_there(tmp_path: Path) -> None:
    assert ensure_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / "kept").write_text("x")
    assert os.listdir(ensure_folder(tmp_path / "a" / "b")) == ["kept"]


FULL_DISK = """
import resource, sys
from dqss.io import Journal, write_files_atomic, write_text_atomic
from dqss.errors import OutputError
folder, kind = sys.argv[1:]
journal = Journal.open(folder + "/journal")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if kind == "one":
        write_text_atomic(folder + "/old", "n" * 5000)
    elif kind == "several":
        write_files_atomic({folder + "/old": b"new", folder + "/large": b"n" * 5000})
    else:
        journal.put("second", {"text": "n" * 5000})
except OutputError as error:
    assert journal.get("second") is None
    print(error)
    sys.exit(2)
"""


@posix_only
@pytest.mark.parametrize(("kind", "named"), [("one", "old"), ("several", "large"), ("journal", "journal")])
def test_full_disk_leaves_old_files_whole(tmp_path: Path, kind: str, named: str) -> None:
    (tmp_path / "old").write_text("old")
    Journal.open(tmp_path / "journal").put("first", {"value": 1})
    before = (tmp_path / "journal").read_bytes()
    done = run_python(FULL_DISK, tmp_path, kind)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.count("\n") == 1
    assert str(tmp_path / named) in done.stdout
    assert "File too large" in done.stdout
    assert (tmp_path / "old").read_text() == "old"
    assert (tmp_path / "journal").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["journal", "old"]


KILLED = """
import os, signal, sys
import dqss.io
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
dqss.io.write_text_atomic(sys.argv[1], "new" * 1000)
"""


@posix_only
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    file = tmp_path / "out"
    file.write_text("old")
    done = run_python(KILLED, file, moment)
    assert done.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_text_atomic(file, "newer")  # what the killed process left is not in the way
    assert file.read_text() == "newer"


def test_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_files_atomic({tmp_path / "a": b"1", tmp_path / "b": b"2"})
        assert os.listdir(tmp_path) == []


JSON_VALUES = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats(), max_size=3),
    max_size=4,
)


@given(st.lists(st.tuples(st.text(max_size=3), JSON_VALUES), max_size=8), st.data())
def test_journal_holds_every_whole_line(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, dict[str, object]]],
    data: st.DataObject,
) -> None:
    file = tmp_path_factory.mktemp("journal") / "memo.jsonl"
    journal, sizes = Journal.open(file), [0]
    for key, value in entries:
        journal.put(key, value)
        sizes.append(file.stat().st_size)

    cut = data.draw(st.integers(0, sizes[-1]), "bytes kept")
    if entries:
        os.truncate(file, cut)
    whole = sum(size <= cut for size in sizes) - 1
    expected: dict[str, object] = dict(entries[:whole])

    again = Journal.open(file)
    for key in {key for key, _ in entries}:
        # repr, so that NaN equals NaN and -0.0 is not 0.0
        assert repr(again.get(key)) == repr(expected.get(key))
    if entries:
        assert file.stat().st_size == sizes[whole]
    again.put("next", {"x": 1})
    assert Journal.open(file).get("next") == {"x": 1}


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\n", b"{}\n", b'{"key": 1, "value": {}}\n', b'"\xff"\n'])
def test_journal_ends_before_a_damaged_line(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "memo.jsonl"
    Journal(file).put("a", {"x": 1})
    good = file.read_bytes()
    file.write_bytes(good + damage + good)
    assert Journal(file).get("a") == {"x": 1}
    assert file.read_bytes() == good


def test_journal_in_memory_reads_as_from_disk(tmp_path: Path) -> None:
    in_memory, on_disk = Journal.open(None), Journal.open(tmp_path / "memo")
    for journal in (in_memory, on_disk):
        journal.put("k", {"pair": (1, math.inf)})
    expected = {"pair": [1, math.inf]}
    assert in_memory.get("k") == on_disk.get("k") == Journal(tmp_path / "memo").get("k") == expected
    assert in_memory.get("other") is None


@posix_only
def test_journal_survives_a_kill(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from dqss.io import Journal
journal = Journal.open(sys.argv[1])
for i in range(50):
    journal.put(str(i), {"kl": i / 7})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(code, tmp_path / "memo")
    assert done.returncode == -signal.SIGKILL
    journal = Journal.open(tmp_path / "memo")
    assert [journal.get(str(i)) for i in range(50)] == [{"kl": i / 7} for i in range(50)]
