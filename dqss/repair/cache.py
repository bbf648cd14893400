"""What blocks are fed with and should give, row by row: on the device, in memory, or else on disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dqss.io import ensure_folder, output_error

CPU = torch.device("cpu")
PREFIX = ".dqss-cache-"
"""Of the names of folders with files."""
DEVICE_SHARE = 0.5
"""Of the free memory of a CUDA device that one tensor may take: what is learned needs some too."""


class Store:
    """Makes tensors in memory while they fit, and as files that are mapped where they do not.

    Args:
        limit: bytes of memory for all that is alive at once.
        folder: where files go; None: where the system keeps temporary ones. They are gone with the store.
        device: where the tensors are read; on CUDA they are made there while they fit, and the limit does
            not count them. Rows that were copied there in each iteration would take longer than it.
    """

    def __init__(self, limit: float, folder: Path | None = None, device: torch.device = CPU) -> None:
        self.limit, self.used, self.device = limit, 0, device
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._folder, self._count = folder, 0
        self._in_memory: dict[int, int] = {}
        for left_over in () if folder is None else folder.glob(f"{PREFIX}*"):
            shutil.rmtree(left_over, ignore_errors=True)  # of a run that was killed

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor, of any values.

        Raises:
            OutputError: where a file cannot be made.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.device.type == "cuda" and size <= DEVICE_SHARE * _free(self.device):
            with suppress(torch.cuda.OutOfMemoryError):  # others use the device as well
                return torch.empty(*shape, dtype=dtype, device=self.device)
        if self.used + size <= self.limit:
            made = torch.empty(*shape, dtype=dtype)
            self.used += size
            self._in_memory[made.data_ptr()] = size
            return made
        return torch.from_file(str(self._file(size)), shared=True, size=math.prod(shape), dtype=dtype).view(
            *shape
        )

    def free(self, tensor: Tensor | None) -> None:
        """Count the memory of ``tensor`` as free; whoever made it must let go of it too."""
        if tensor is not None:
            self.used -= self._in_memory.pop(tensor.data_ptr(), 0)

    def close(self) -> None:
        """Remove the files."""
        if self._files is not None:
            self._files.cleanup()

    @property
    def on_disk(self) -> int:
        """How many tensors did not fit into memory."""
        return self._count

    def _file(self, size: int) -> Path:
        try:
            if self._files is None:
                place = None if self._folder is None else ensure_folder(self._folder)
                self._files = tempfile.TemporaryDirectory(prefix=PREFIX, dir=place)
            path = Path(self._files.name) / str(self._count)
            with path.open("wb") as file:
                file.truncate(size)
        except OSError as error:
            raise output_error(self._folder or tempfile.gettempdir(), error) from error
        self._count += 1
        return path


def _free(device: torch.device) -> int:
    """Bytes of a CUDA device that this process could have."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class Rows:
    """A tensor that is filled batch by batch, as many rows a sample as the first batch has.

    Args:
        store: where it is kept.
        samples: how many there will be.
    """

    def __init__(self, store: Store, samples: int) -> None:
        self.store, self.samples = store, samples
        self._tensor: Tensor | None = None
        self._filled = 0

    def add(self, batch: Tensor, samples: int) -> None:
        """Append the rows of a batch of so many ``samples``."""
        if self._tensor is None:
            rows = len(batch) // samples * self.samples
            self._tensor = self.store.empty((rows, *batch.shape[1:]), batch.dtype)
        self._tensor[self._filled : self._filled + len(batch)].copy_(batch.detach())
        self._filled += len(batch)

    @property
    def tensor(self) -> Tensor:
        """All rows."""
        assert self._tensor is not None and self._filled == len(self._tensor)
        return self._tensor
