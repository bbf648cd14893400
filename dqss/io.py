"""Writing that loses nothing: files appear whole or not at all, measured values are kept at once.

No torch here. Every failure of the disk becomes one :class:`~dqss.errors.OutputError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dqss.errors import OutputError

StrPath: TypeAlias = str | os.PathLike[str]

_WAYS_OUT = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the file size limit",
}


def output_error(path: StrPath, error: OSError) -> OutputError:
    """The one line for a place that cannot be written: what, why, and the way out."""
    way_out = _WAYS_OUT.get(error.errno or 0, "choose another output folder")
    reason = error.strerror or str(error)
    for parent in Path(path).parents:
        if os.path.exists(parent) and not os.path.isdir(parent):
            reason = f"{str(parent)!r} is a file, not a folder"
            break
    return OutputError(f"cannot write {str(path)!r}: {reason}; {way_out}")


def ensure_folder(path: StrPath) -> Path:
    """Make the folder and its parents if need be, and check that it can be written.

    Raises:
        OutputError: where that is impossible.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the folder is not writable")
    except FileExistsError as error:
        in_the_way = NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        raise output_error(folder, in_the_way) from error
    except OSError as error:
        raise output_error(folder, error) from error
    return folder


def write_files_atomic(files: Mapping[str, bytes] | Mapping[Path, bytes]) -> None:
    """Write several files that belong together, in the given order.

    All are complete on the disk under temporary names before the first is renamed, so that a
    full disk leaves every old file whole; only a kill between two renames can part them.

    Raises:
        OutputError: naming the file that could not be written.
    """
    staged: list[tuple[Path, Path]] = []
    target = Path()
    try:
        for name, data in files.items():
            target = Path(name)
            staged.append((_stage(target, data), target))
        for temporary, target in staged:
            os.replace(temporary, target)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        for temporary, _ in staged:
            _remove(temporary)
    for folder in {target.parent for _, target in staged}:
        _sync_folder(folder)


def write_bytes_atomic(path: StrPath, data: bytes) -> None:
    """Replace the file by ``data``, or leave what was there whole.

    Raises:
        OutputError: naming the file and the reason.
    """
    write_files_atomic({Path(path): data})


def write_text_atomic(path: StrPath, text: str) -> None:
    """:func:`write_bytes_atomic` of UTF-8 text; line ends are written as given."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: StrPath, obj: Any) -> None:
    """:func:`write_text_atomic` of :func:`json_text`."""
    write_text_atomic(path, json_text(obj))


def json_text(obj: Any) -> str:
    """Indented JSON in the given key order, a newline at the end.

    Finite floats read back to the same bits. JSON has no word for infinity and NaN, they
    become ``null``.
    """
    return json.dumps(finite_json(obj), indent=2, allow_nan=False) + "\n"


def finite_json(obj: Any) -> Any:
    """A copy of nested dicts, lists and tuples with None in place of infinite and NaN floats."""
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {key: finite_json(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [finite_json(value) for value in obj]
    return obj


class Journal:
    """A memo of measured values that survives a kill at any moment: one JSON object a line.

    Lines are only ever appended. From the first damaged line on (normally the last, cut short
    by a kill) the file is dropped: what is lost can be measured again.

    Args:
        path: the file, made with the first value; None keeps the values in memory only.

    Raises:
        OutputError: where the file cannot be read or written.
    """

    def __init__(self, path: StrPath | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._values: dict[str, dict[str, Any]] = {}
        if self.path is not None:
            self._recover(self.path)

    @classmethod
    def open(cls, path: StrPath | None) -> Journal:
        """The journal at ``path`` with what it already holds."""
        return cls(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The value last put under ``key``, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep ``value`` (made of JSON types; infinity and NaN allowed) before returning."""
        line = json.dumps({"key": key, "value": dict(value)}).encode() + b"\n"
        if self.path is not None:
            _append(self.path, line)
        # What a resumed run will read is what this run reads: tuples are lists from here on.
        self._values[key] = json.loads(line)["value"]

    def _recover(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            whole = 0
            for line in data.splitlines(keepends=True):
                entry = _journal_entry(line)
                if entry is None:
                    break
                self._values[entry[0]] = entry[1]
                whole += len(line)
            if whole < len(data):
                os.truncate(path, whole)
        except FileNotFoundError:
            return
        except OSError as error:
            raise output_error(path, error) from error


def _journal_entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        match json.loads(line):
            case {"key": str(key), "value": dict(value)}:
                return key, value
    except (ValueError, RecursionError):
        pass
    return None


def _append(path: Path, line: bytes) -> None:
    """Append a whole line straight to the operating system, or leave the file as it was."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            start = os.fstat(handle).st_size
            try:
                _write_all(handle, line)
            except BaseException:
                os.ftruncate(handle, start)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise output_error(path, error) from error


def _stage(target: Path, data: bytes) -> Path:
    """Write ``data`` to a new file beside ``target``, down to the disk."""
    # Beside it, because a rename is atomic only within a file system; a short name of its own,
    # because the target's may already be as long as names can be.
    temporary = target.parent / f".dqss-{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666)
    try:
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        _remove(temporary)
        raise
    return temporary


def _write_all(handle: int, data: bytes) -> None:
    # A nearly full disk takes a part without an error; the next write says why.
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    # The files are whole already; some systems cannot sync a folder, and that is no failure.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
