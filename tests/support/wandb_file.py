"""Reads what an offline run of Weights & Biases wrote: its own records, in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

_FILE, _ENTRY, _BLOCK = struct.Struct("<4sHB"), struct.Struct("<IHB"), 32768
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[protocol.Record]:
    """All records of a ``.wandb`` file."""
    data, whole = file.read_bytes(), b""
    ident, magic, _ = _FILE.unpack_from(data)
    assert (ident, magic) == (b":W&B", 0xBEE1)
    place = _FILE.size
    while place < len(data):
        if _BLOCK - place % _BLOCK < _ENTRY.size:  # too little for a header: filled up with zeros
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = _ENTRY.unpack_from(data, place)
        place += _ENTRY.size
        whole += data[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            record = protocol.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def value_of(item: Any) -> tuple[str, Any]:
    """Name and value of an item of a configuration or a history."""
    return item.key or "/".join(item.nested_key), json.loads(item.value_json)
