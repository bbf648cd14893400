"""What exports to every format share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.deploy.compared import Parity
from dqss.deploy.function import tensors_of
from dqss.deploy.targets import Target
from dqss.deploy.tolerance import Tolerance
from dqss.errors import ExportError
from dqss.measure import home, to_device
from dqss.prepare import prepare
from dqss.progress import Reporter
from dqss.samples import Samples

BATCH, PART_BATCH = 32, 8
"""Inputs at a time; fewer where every activation of the network is kept."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`dqss.deploy.export.export_model`."""

    target: Target
    dynamic_size: bool | None
    tolerance: Tolerance
    part_inputs: int
    metric: Callable[[], Any] | None
    watch: Callable[[Parity], None] | None
    threads: int
    force: bool
    reporter: Reporter


def float_network(model: nn.Module, bundle: Bundle, example: Any) -> nn.Module:
    """What the simulation approximates, on the CPU."""
    return prepare(model, to_device(example, home(model)), recipe=bundle.strategy.model.prepare).model.cpu()


def check_precision(model: nn.Module) -> None:
    """Refuse a network in another type than float32.

    Raises:
        ExportError: naming the type.
    """
    odd = next(
        (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None
    )
    if odd is not None:
        raise ExportError(f"the network is {odd}: give it in float32, model.float()")


@torch.no_grad()
def makes_images(network: nn.Module, example: Any) -> bool:
    """Whether images go in and come out, so that their size should stay open."""
    output = first_tensor(call_model(network, example))
    return output.ndim == 4 and any(tensor.ndim == 4 for tensor in tensors_of(example))


class Meters:
    """The task metric of both, where there are targets."""

    def __init__(
        self, metric: Callable[[], Any] | None, samples: Samples, size: int, runtime: str = "onnxruntime"
    ) -> None:
        self.samples, self.size, self.position = samples, size, 0
        kinds = ("simulation", runtime) if metric is not None and samples.labelled else ()
        self.meters = {kind: metric() for kind in kinds if metric is not None}

    def seen(self, wanted: Tensor, found: Tensor) -> None:
        """The next outputs of both."""
        indices = range(self.position, min(self.position + self.size, len(self.samples)))
        self.position = indices.stop
        for kind, output in zip(self.meters, (wanted, found), strict=False):
            self.meters[kind].update(output, self.samples.targets(indices))

    def values(self) -> dict[str, float]:
        """By ``simulation`` and the runtime's name."""
        return {kind: float(meter.compute()) for kind, meter in self.meters.items()}
