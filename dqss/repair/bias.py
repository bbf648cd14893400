"""Bias correction: the mean of every layer's output is moved to where the float network has it.

Rounding shifts the mean of a layer's output; the shift, measured per channel on inputs, is taken off
the bias (arXiv 1906.04721, section 4.2 and appendix D: the empirical form). Layers are corrected in the
order in which they run, each in a network whose earlier ones are corrected already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dqss.calls import call_model
from dqss.layers import describe
from dqss.repair.partial import Enough, run_until_enough

Batches = Callable[[], Iterable[Any]]


class _Mean:
    """Mean of a layer's output per channel, over all batches, in double precision."""

    def __init__(self, axis: int) -> None:
        self.axis, self.sum, self.count = axis, torch.zeros(()), 0

    def add(self, output: Tensor) -> None:
        rows = output.detach().double().movedim(self.axis, -1).flatten(0, -2)
        self.sum = self.sum + rows.sum(0).cpu()
        self.count += len(rows)

    @property
    def value(self) -> Tensor:
        return self.sum / self.count


@torch.no_grad()
def correct_biases(
    exact: nn.Module,
    quantized: nn.Module,
    layers: Sequence[str],
    batches: Batches,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Correct the biases of ``quantized`` in place.

    Args:
        exact: the float network.
        quantized: the fixed quantized one, with the same names.
        layers: names of the layers to correct.
        batches: gives the inputs, from the first one on each time.
        advance: told of each layer.

    Returns:
        The new biases, fp32 ``[C]`` on the CPU, and the names of layers that were left alone because
        they are not called exactly once in a pass.
    """
    modules = dict(exact.named_modules())
    axes = {}
    for name in layers:
        info = describe(name, modules[name])
        assert info is not None
        axes[name] = info.input_axis  # where outputs have their channels too
    wanted, order = _means(exact, axes, batches)
    found: dict[str, Tensor] = {}
    for name in order:
        advance()
        layer = quantized.get_submodule(name)
        shift = wanted[name] - _mean_of(quantized, layer, axes[name], batches)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor = torch.zeros(len(shift)) if layer.bias is None else layer.bias  # type: ignore[assignment]
        corrected = (bias.double().cpu() + shift).to(torch.float32)
        layer.bias = nn.Parameter(corrected.to(weight), requires_grad=False)
        found[name] = corrected
    return found, [name for name in layers if name not in found]


def _means(
    exact: nn.Module, axes: Mapping[str, int], batches: Batches
) -> tuple[dict[str, Tensor], list[str]]:
    """Means of all layers that each batch calls once, and their order."""
    means = {name: _Mean(axis) for name, axis in axes.items()}
    calls: dict[str, int] = {}
    once = set(axes)
    with ExitStack() as stack:
        for name in axes:

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                means[name].add(output)

            handle = exact.get_submodule(name).register_forward_hook(hook)
            stack.callback(handle.remove)
        for batch in batches():
            calls.clear()
            call_model(exact, batch)
            once -= {name for name in axes if calls.get(name, 0) != 1}
    return {name: means[name].value for name in once}, [name for name in calls if name in once]


def _mean_of(model: nn.Module, layer: nn.Module, axis: int, batches: Batches) -> Tensor:
    mean = _Mean(axis)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        mean.add(output)
        raise Enough

    handle = layer.register_forward_hook(hook)
    try:
        for batch in batches():
            run_until_enough(model, batch)
    finally:
        handle.remove()
    return mean.value
