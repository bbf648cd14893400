"""What the steps of a preparation share: the network at hand, its batch, and the float reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dqss.calls import call_model, tensors_in
from dqss.precision import full_precision


def _copy_inputs(inputs: Any) -> Any:
    """A copy, because models write into their inputs (an in-place ReLU first)."""
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, Mapping):
        return {key: _copy_inputs(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        items = [_copy_inputs(item) for item in inputs]
        return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)
    return inputs


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Full precision, and the same bits each time."""
    cudnn = torch.backends.cudnn
    kept, cudnn.deterministic = cudnn.deterministic, True
    try:
        with full_precision():
            yield
    finally:
        cudnn.deterministic = kept


@contextlib.contextmanager
def reproducible(model: nn.Module) -> Iterator[None]:
    """No gradients, full precision, and random numbers that neither vary nor are missed outside."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    precision = _exactly() if devices else contextlib.nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices=devices), precision:
        # torch.manual_seed would also reseed devices that are not put back.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d] for d in devices)):
            generator.manual_seed(0)
        yield


def run(model: nn.Module, inputs: Any) -> Any:
    """The output for one batch, which stays as it is."""
    with reproducible(model):
        return call_model(model, _copy_inputs(inputs))


def difference(reference: Tensor, output: Tensor) -> float:
    """Largest absolute difference over largest absolute value of ``reference``; inf where incomparable."""
    if reference.shape != output.shape:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, output) else float("inf")
    reference, output = reference.double(), output.double()
    finite = torch.isfinite(reference)
    if not torch.equal(reference[~finite].nan_to_num(), output[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    error = (reference[finite] - output[finite]).abs().max().item()
    size = reference[finite].abs().max().item()
    return 0.0 if error == 0 else error / size if size > 0 else float("inf")


def tolerance(wanted: float, *tensors: Tensor) -> float:
    """``wanted``, or a few roundings of the coarsest dtype if that is more."""
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)
    return max(wanted, 8 * coarsest)


Bits: TypeAlias = Callable[[str], tuple[int | None, int | None]]


def eight(name: str) -> tuple[int | None, int | None]:
    """Bits of the weight and of the input of a layer, by its name; None for what stays in float."""
    return 8, 8


@dataclass
class Work:
    """A copy of the user's network on its way to the canonical one.

    Attributes:
        model: the copy; steps change or exchange it.
        inputs: one batch.
        reference: the original's output tensors for it.
        skip: names of layers that will not be searched.
        replay: do what the recipe says, verify nothing.
        bits: see :func:`eight`, whatever they are, where a step tries how layers are quantized.
        notes: what could not be done, for people.
    """

    model: nn.Module
    inputs: Any
    reference: list[Tensor]
    skip: Callable[[str], bool]
    replay: bool = False
    bits: Bits = eight
    notes: list[str] = field(default_factory=list)

    def error(self, model: nn.Module) -> float:
        """How far ``model`` is from the original on the batch; inf if it cannot run or compare."""
        try:
            output = list(tensors_in(run(model, self.inputs)))
        except Exception:
            return float("inf")
        if len(output) != len(self.reference):
            return float("inf")
        return max((difference(a, b) for a, b in zip(self.reference, output, strict=True)), default=0.0)

    def verifies(self, model: nn.Module, wanted: float) -> bool:
        """Whether ``model`` gives the original's output to the relative tolerance ``wanted``."""
        return self.error(model) <= tolerance(wanted, *self.reference)

    def output(self) -> list[Tensor]:
        """The output tensors of the copy as it stands."""
        return [tensor.clone() for tensor in tensors_in(run(self.model, self.inputs))]

    def keeps(self, before: Sequence[Tensor], wanted: float) -> bool:
        """Whether the copy still gives the output ``before``, to the relative tolerance ``wanted``."""
        allowed = tolerance(wanted, *before)
        return all(difference(a, b) <= allowed for a, b in zip(before, self.output(), strict=True))
