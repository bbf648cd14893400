"""The grids of a bundle as ONNX wants them: integers in containers, scales by tensor, axis or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from dqss.bundle import Bundle
from dqss.choice import TensorChoice
from dqss.deploy.containers import Container, Held
from dqss.functional import broadcast_channels, dequantize, quantize
from dqss.spec import PerGroup, PerTensor, QuantSpec

Array = np.ndarray[Any, Any]


def dtype_of(container: Container) -> Any:
    """The numpy type of a container; those of four bits come from ``ml_dtypes``."""
    return getattr(ml_dtypes, container.name) if container.bits < 8 else np.dtype(container.name)


@dataclass(frozen=True)
class Grids:
    """Every quantizer of a strategy by its name: ``conv1.weight``, ``blocks.0.attn.product1.left``."""

    bundle: Bundle

    def choices(self) -> dict[str, TensorChoice]:
        """What was chosen, by the quantizer's name."""
        return {f"{layer}.{role}": choice for layer, role, choice in self.bundle.strategy.choices()}

    def spec(self, name: str) -> QuantSpec:
        """Integer bounds and granularity."""
        return self.choices()[name].candidate().spec

    def scale(self, name: str) -> Tensor:
        """fp32 ``[C]``."""
        return self.bundle.tensors[f"{name}.scale"]

    def zero_point(self, name: str) -> Tensor:
        """fp32 ``[C]``, whole numbers."""
        return self.bundle.tensors[f"{name}.zero_point"]


@dataclass(frozen=True)
class Stored:
    """A quantized weight as the inputs of a ``DequantizeLinear``.

    Attributes:
        codes: integers; in the weight's own shape, or ``[channels, rest]`` for groups.
        scale: a scalar, ``[C]`` along ``axis``, or ``[channels, blocks]``.
        zero_point: like ``scale``; None where it is zero, which is ONNX's default.
        axis: of the channels or, for groups, along which blocks lie.
        block: length of a block; 0 where there are none.
        rows: the shape with the channels first that ``[channels, rest]`` is a view of; None where
            the codes have the weight's own shape.
        channel_axis: where the channels belong, if ``rows`` is not None.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    axis: int
    block: int = 0
    rows: tuple[int, ...] | None = None
    channel_axis: int = 0

    def transposed(self) -> Stored:
        """Of a matrix, with its axes exchanged."""
        scale, zero = (None if x is None else x.T.copy() for x in (self.scale, self.zero_point))
        assert scale is not None and self.codes.ndim == 2 and self.rows is None
        return Stored(self.codes.T.copy(), scale, zero, 1 - self.axis, self.block)


def store(
    weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, held: Held, apart: bool
) -> Stored:
    """Integer codes of a weight that holds quantized values.

    Args:
        weight: fp32, every value on the grid.
        scale, zero_point: fp32 ``[C]``.
        spec: the grid.
        held: how the integer type holds it.
        apart: in another shape than its own, whatever the granularity.

    Raises:
        ValueError: where the weight is not on the grid, to the bit.
    """
    shape, grain = weight.shape, spec.granularity
    step, zero = (broadcast_channels(part, shape, grain) for part in (scale, zero_point))
    codes = quantize(weight, step, zero, spec)
    if not torch.equal(dequantize(codes, step, zero), weight):
        raise ValueError("the weight is not on its grid")
    factor, kind = 1 << held.shift, dtype_of(held.container)
    scales: Array = (scale / factor).numpy()
    zeros: Array | None = _integers(zero_point * factor, kind)
    if bool((scale / factor < torch.finfo(torch.float32).tiny).any()):
        raise ValueError("a scale is too small to be stored")
    codes = codes * factor
    if held.container.bits < 8 and not zero_point.any():
        zeros = None  # which is what its absence means; a kernel for bytes wants to see it
    if isinstance(grain, PerTensor):
        scales, zeros = scales.reshape(()), None if zeros is None else zeros.reshape(())
        axis = 0
    else:
        axis = grain.axis % weight.ndim
    if not apart and not isinstance(grain, PerGroup):
        return Stored(_integers(codes, kind), scales, zeros, axis)
    rows = codes.movedim(axis, 0)
    flat = _integers(rows.reshape(len(rows), -1), kind)
    if not isinstance(grain, PerGroup):
        # A third axis, so that a matrix changes its shape too.
        return Stored(flat[..., None], scales, zeros, 0, 0, tuple(rows.shape), axis)
    scales = scales.reshape(len(rows), -1)
    zeros = None if zeros is None else zeros.reshape(len(rows), -1)
    size = min(grain.size, flat.shape[1])
    own = not apart and codes.ndim == 2 and axis == 0
    return Stored(flat, scales, zeros, 1, size, None if own else tuple(rows.shape), axis)


def _integers(values: Tensor, kind: Any) -> Array:
    # By way of int32: there is no cast from float to four bits that is sure to round nothing.
    found: Array = values.numpy().astype(np.int32).astype(kind)
    return found
