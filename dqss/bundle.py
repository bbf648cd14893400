"""A strategy with its tensors: what rebuilds the quantized network without calibration data."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dqss.choice import TensorChoice
from dqss.errors import StrategyError
from dqss.io import StrPath, ensure_folder, write_files_atomic
from dqss.spec import MIDDLE, PerTensor
from dqss.strategy import STRATEGY_FILE, Strategy, one_line, read_bytes

TENSORS_FILE = "tensors.safetensors"

_WAY_OUT = "the strategy and its tensors do not belong together: restore both files or search again"


@dataclass(frozen=True, eq=False)
class Bundle:
    """What is in a run folder: the choices, and the tensors that they need.

    Attributes:
        strategy: the choices.
        tensors: ``{layer}.weight.scale``, ``{layer}.weight.zero_point`` and the same for
            ``activation`` and the operands of products, fp32 ``[C]``, for every tensor that the
            strategy quantizes (C is 1 per tensor); where a weight is tuned ``{layer}.weight.codes``, its
            integers in its own shape, and where a bias is corrected ``{layer}.bias``; other keys,
            such as ``state.*``, are kept as they are.

    Raises:
        StrategyError: where a tensor is missing or fits no grid of its choice.
    """

    strategy: Strategy
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, role, choice in self.strategy.choices():
            _check_qparams(f"{name}.{role}", choice, self.tensors)
            if role == "weight" and choice.tuned:
                _check_codes(f"{name}.weight.codes", choice, self.tensors)
        for name, layer in self.strategy.layers.items():
            if layer.bias_corrected:
                _check_bias(f"{name}.bias", self.tensors)

    def save(self, folder: StrPath) -> Bundle:
        """Write ``tensors.safetensors`` and ``strategy.json``, each whole or not at all.

        Returns:
            The bundle as written: its strategy records the hash of the tensors file.

        Raises:
            OutputError: where the folder cannot be written; old files stay as they were.
        """
        place = ensure_folder(folder)
        # Own memory for each: the format refuses tensors that share it.
        own = {key: self.tensors[key].detach().cpu().contiguous().clone() for key in sorted(self.tensors)}
        data = safetensors.torch.save(own)
        strategy = self.strategy.model_copy(update={"tensors_sha256": hashlib.sha256(data).hexdigest()})
        write_files_atomic({place / TENSORS_FILE: data, place / STRATEGY_FILE: strategy.to_json().encode()})
        return Bundle(strategy, self.tensors)

    @classmethod
    def load(cls, path: StrPath) -> Bundle:
        """Read a run folder, or a strategy file with its tensors beside it; tensors on the CPU.

        Raises:
            StrategyError: where a file is missing or damaged, or the two do not belong together.
        """
        strategy = Strategy.load(path)
        folder = Path(path) if os.path.isdir(path) else Path(path).parent
        file = folder / TENSORS_FILE
        data = read_bytes(file)
        if hashlib.sha256(data).hexdigest() != strategy.tensors_sha256:
            raise StrategyError(one_line(f"{file}: not the file that {STRATEGY_FILE} records; {_WAY_OUT}"))
        try:
            return cls(strategy, safetensors.torch.load(data))
        except StrategyError as error:
            raise StrategyError(one_line(f"{file}: {error}")) from error
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StrategyError(one_line(f"{file}: no safetensors file ({error}); {_WAY_OUT}")) from error


def load(path: StrPath) -> Bundle:
    """The strategy and tensors of a run folder; see :meth:`Bundle.load`."""
    return Bundle.load(path)


def _check_qparams(name: str, choice: TensorChoice, tensors: dict[str, Tensor]) -> None:
    spec = choice.candidate().spec
    vectors = []
    for key in (f"{name}.scale", f"{name}.zero_point"):
        if key not in tensors:
            raise _misfit(key, "missing")
        vector = tensors[key]
        if vector.dtype != torch.float32 or vector.ndim != 1 or vector.numel() == 0:
            raise _misfit(key, f"expected fp32 [C], got {vector.dtype} {list(vector.shape)}")
        if isinstance(spec.granularity, PerTensor) and vector.numel() != 1:
            raise _misfit(key, f"expected one value per tensor, got {vector.numel()}")
        vectors.append(vector)
    scale, zero_point = vectors
    if scale.shape != zero_point.shape:
        raise _misfit(f"{name}.zero_point", f"{zero_point.numel()} values for {scale.numel()} scales")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise _misfit(f"{name}.scale", "expected finite values above zero")
    if spec.mirrored and bool((zero_point == MIDDLE).all()):
        return
    low, high = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    if not bool(((zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)).all()):
        raise _misfit(f"{name}.zero_point", f"expected integers in {low}..{high}")


def _check_codes(key: str, choice: TensorChoice, tensors: dict[str, Tensor]) -> None:
    if key not in tensors:
        raise _misfit(key, "missing")
    codes, spec = tensors[key], choice.candidate().spec
    if codes.dtype not in (torch.int8, torch.uint8, torch.int32) or codes.numel() == 0:
        raise _misfit(key, f"expected integer codes, got {codes.dtype} {list(codes.shape)}")
    if int(codes.min()) < spec.qmin or int(codes.max()) > spec.qmax:
        raise _misfit(key, f"expected integers in {spec.qmin}..{spec.qmax}")


def _check_bias(key: str, tensors: dict[str, Tensor]) -> None:
    if key not in tensors:
        raise _misfit(key, "missing")
    bias = tensors[key]
    if bias.dtype != torch.float32 or bias.ndim != 1 or not bool(torch.isfinite(bias).all()):
        raise _misfit(key, f"expected finite fp32 [C], got {bias.dtype} {list(bias.shape)}")


def _misfit(key: str, fault: str) -> StrategyError:
    return StrategyError(one_line(f"tensor {key!r}: {fault}; {_WAY_OUT}"))
