"""Weights from a file into a network: safetensors, or torch files without code in them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dqss.errors import ModelError, near_match

_TORCH_SUFFIXES = (".pth", ".th", ".pt", ".ckpt", ".bin", ".tar")
# The averaged weights come first because they are the ones that training reports.
_WRAPPERS = ("state_dict_ema", "model_ema", "params_ema", "state_dict", "model_state_dict", "model", "params")
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Counts batches in training; evaluation does not read it and old files do not have it.
_COUNTER = "num_batches_tracked"


class CheckpointMapping(Enum):
    """How the tensors of a file find their places in the network."""

    NAME = "name"
    ORDER = "order"

    @classmethod
    def of(cls, value: str | CheckpointMapping) -> CheckpointMapping:
        """The member that ``value`` names.

        Raises:
            ModelError: for an unknown name.
        """
        if isinstance(value, cls):
            return value
        known = [member.value for member in cls]
        if value not in known:
            hint = near_match(str(value), known)
            raise ModelError(f"checkpoint_mapping={value}: expected name or order{hint}")
        return cls(value)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    what: str,
    mapping: str | CheckpointMapping = CheckpointMapping.NAME,
    options: str = "model.name or model.num_classes",
) -> None:
    """Load the weights in ``path`` into ``model``, all of them or none.

    Args:
        model: the network; its parameters and buffers are overwritten in place.
        path: ``.safetensors``, or a torch file that holds tensors and plain containers.
        what: name of the network for messages.
        mapping: by name, or by position for files whose tensors agree with the network's in
            number, order and shapes under other names.
        options: what decides the shapes of the network, for messages.

    Raises:
        ModelError: if the file is missing, damaged, holds code (which is not run), or its
            tensors are not those of the network.
    """
    mapping = CheckpointMapping.of(mapping)
    path = Path(path).expanduser()
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(_COUNTER)}
    found = _without_prefix(read_tensors(path), own)
    found = {key: value for key, value in found.items() if not key.endswith(_COUNTER)}
    if mapping is CheckpointMapping.ORDER:
        found = _by_order(found, own, path, what)
    _check(found, own, path, what, options)
    model.load_state_dict(found, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file, on the CPU, without running anything in it.

    Raises:
        ModelError: if the file is missing, damaged, holds code, or no tensors.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.suffix.lower() == ".safetensors":
        tensors: dict[str, Tensor] = _guarded(path, lambda: load_file(path))
        return tensors
    if path.suffix.lower() not in _TORCH_SUFFIXES:
        raise ModelError(f"checkpoint {path}: expected .safetensors or one of {', '.join(_TORCH_SUFFIXES)}")
    content = _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return _unwrap(content, path)


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """The result of ``read``, whose many kinds of failure become one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except pickle.UnpicklingError as error:
        fault = "holds" if "GLOBAL" in str(error) else "is damaged, or holds"
        raise ModelError(
            f"checkpoint {path} {fault} Python objects besides tensors, which were not run; "
            "if you trust its origin, save its state_dict as .safetensors"
        ) from None
    except PermissionError:
        raise ModelError(f"checkpoint {path} is not readable: permission denied") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"checkpoint {path} is damaged: {reason[0]}") from None


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside the usual wrappings."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"checkpoint {path} holds no named tensors: expected a state_dict")
    return tensors


def _without_prefix(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what every name starts with and the network's names do not."""
    for prefix in (*_PREFIXES, *_PREFIXES):
        theirs = all(key.startswith(prefix) for key in found)
        if theirs and not all(key.startswith(prefix) for key in own):
            found = {key[len(prefix) :]: value for key, value in found.items()}
    return found


def _matches_in_order(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return [value.shape for value in found.values()] == [value.shape for value in own.values()]


def _by_order(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, what: str
) -> dict[str, Tensor]:
    if _matches_in_order(found, own):
        return dict(zip(own, found.values(), strict=True))
    if len(found) != len(own):
        raise ModelError(
            f"checkpoint {path} cannot be mapped by order: {len(found)} tensors, {what} has {len(own)}"
        )
    mine, theirs = next(
        pair for pair in zip(own, found, strict=True) if own[pair[0]].shape != found[pair[1]].shape
    )
    raise ModelError(
        f"checkpoint {path} cannot be mapped by order: {theirs} {list(found[theirs].shape)} "
        f"would go to {mine} {list(own[mine].shape)} of {what}"
    )


def _check(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, what: str, options: str
) -> None:
    """Raise unless names and shapes agree."""
    shapes = [
        f"{key} ({list(found[key].shape)} in the file, {list(value.shape)} in the model)"
        for key, value in own.items()
        if key in found and found[key].shape != value.shape
    ]
    faults = [
        _few("missing", [key for key in own if key not in found]),
        _few("unexpected", [key for key in found if key not in own]),
        _few("of another shape", shapes),
    ]
    faults = [fault for fault in faults if fault]
    if not faults:
        return
    way_out = f"give the {options} that it was trained with"
    if _matches_in_order(found, own):
        way_out = "shapes agree in order: model.checkpoint_mapping=order loads them by position"
    raise ModelError(f"checkpoint {path} does not fit {what}: {'; '.join(faults)}; {way_out}")


def _few(kind: str, names: list[str], count: int = 3) -> str:
    """``"5 missing: a, b, c, ..."``, or nothing."""
    if not names:
        return ""
    return f"{len(names)} {kind}: {', '.join(names[:count])}{', ...' if len(names) > count else ''}"
