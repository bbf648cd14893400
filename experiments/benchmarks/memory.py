"""Peak memory of a step above the network's own, in a process that does nothing else.

On the CPU a peak is that of the resident memory, which the kernel keeps; see :data:`ENVIRONMENT`
for what that needs. On CUDA it is that of the allocator.

    above the model's own = (peak during a step - at rest) + (tensors alive at rest - own)

At rest everything is built and compiled and some steps have been made, but no gradient is held.
*Own* are the parameters and buffers of the float network and the inputs. So optimizer states, copies
of the network and codes of candidates count, while the interpreter and the compiler do not.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""For the process that is measured: the C library gives freed buffers back to the kernel at once.

Otherwise it keeps some for later, and a peak would depend on what was freed long before.
"""
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """Bytes above the network's own at the peak of a step.

    Attributes:
        passing: what a step takes and gives back.
        kept: what stays between steps.
    """

    passing: float
    kept: float

    @property
    def total(self) -> float:
        """Both."""
        return self.passing + self.kept


def peak_of(
    step: Callable[[], object],
    release: Callable[[], object],
    own: Iterable[Tensor],
    device: torch.device,
    repeats: int = 3,
) -> Peak:
    """Measure some steps, all of the same kind.

    Args:
        step: warmed up: nothing is left to compile.
        release: drops the gradients.
        own: tensors that do not count.
        device: where the step runs.
        repeats: steps; the median counts.
    """
    passing = []
    for _ in range(repeats):
        release()
        gc.collect()
        passing.append(_growth(step, device))
    release()
    gc.collect()
    kept = bytes_of(alive(device)) - bytes_of(t for t in own if t.device.type == device.type)
    return Peak(float(median(passing)), float(kept))


def own_tensors(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What a float network has in memory before anything is done with it."""
    return [*model.parameters(), *model.buffers(), inputs]


def alive(device: torch.device) -> list[Tensor]:
    """All tensors that Python knows of, on that kind of device."""
    # By their type, not isinstance: that would run the code of lazy objects.
    found = (x for x in gc.get_objects() if issubclass(type(x), Tensor))
    return [x for x in found if type(x) in (Tensor, nn.Parameter) and x.device.type == device.type]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory behind ``tensors``, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def limit_to_available(share: float = 0.9) -> None:
    """Let allocations fail before the machine runs out of memory: Python can tell of that."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(share * available), hard))


def _growth(step: Callable[[], object], device: torch.device) -> int:
    """Peak of a step minus what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    (PROC / "clear_refs").write_text("5")  # sets the peak to the present value
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
