"""Small networks and the shortest way to a calibrated supernet on one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqss.apply import make_bundle
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.io import Journal
from dqss.losses import Distance, KLDivergence
from dqss.measure import Evaluator, Meter, home
from dqss.prepare import Prepared, prepare
from dqss.samples import Samples
from dqss.space import SearchSpace
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Assignment, Supernet
from search_spaces import uniform

TWO = ("minmax", {"name": "percentile", "p": 70.0})
THREE = (*TWO, "mse")
EVERY_PASS = ("minmax", "hessian", {"name": "moving_average", "momentum": 0.5})
"""Algorithms that look at more than the values."""


def small_space(
    bits: int | Sequence[int] = 3, algorithms: Sequence[Any] = TWO, **options: Any
) -> SearchSpace:
    """A few algorithms for weights and activations."""
    return uniform(bits, bits, algorithms, algorithms, **options)


def cnn(classes: int = 4) -> nn.Sequential:
    """Inputs ``[N, 3, 6, 6]``; a batch norm to fold, a strided and a depthwise convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, classes),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        norm.weight.uniform_(0.5, 1.5)
    return model.eval()


def images(count: int, *shape: int) -> Tensor:
    """Random inputs, ``[count, 3, 6, 6]`` unless another shape is given."""
    return torch.randn(count, *(shape or (3, 6, 6)))


def calibrated(model: nn.Module, *batches: Any, space: SearchSpace | None = None) -> Supernet:
    """A supernet on a copy of ``model`` (as it is, nothing folded), calibrated on ``batches``."""
    import copy

    supernet = Supernet(copy.deepcopy(model), space or small_space()).to(home(model))
    supernet.calibrate(batches, probes=batches)
    return supernet


def prepared_supernet(model: nn.Module, batch: Any, space: SearchSpace) -> tuple[Prepared, Supernet]:
    """The way a search takes: prepare, attach, calibrate on one batch."""
    prepared = prepare(model, batch)
    supernet = Supernet(prepared.model, space)
    supernet.calibrate([batch], probes=[batch])
    return prepared, supernet


def bundle_of(prepared: Prepared, supernet: Supernet, assignment: Assignment, batch: Any) -> Bundle:
    """What a search would write down for ``assignment``."""
    model = ModelInfo(source="python", name="test", weights_sha256="", tensors={}, prepare=[])
    fields: dict[str, Any] = {"dqss": "0", "created": utc_now(), "search_space": "test", "method": "ptq"}
    return make_bundle(supernet, assignment, prepared, model, batch, seed=0, budget=None, **fields)


def evaluator_of(
    supernet: Supernet, inputs: Tensor, parts: dict[str, list[int]], distance: Distance | None = None
) -> Evaluator:
    """An evaluator on the CPU with batches of four."""
    device = torch.device("cpu")
    distance = distance or KLDivergence()
    return Evaluator(supernet, Samples.of(inputs), parts, distance, 4, device, Meter(), Journal())


def every_other(supernet: Supernet, start: int = 0) -> dict[str, int]:
    """An assignment that is not uniform: options in rotation."""
    return {
        name: (start + position) % len(decision.options)
        for position, (name, decision) in enumerate(supernet.decisions.items())
    }


def output(model: nn.Module, batch: Any) -> Tensor:
    """The tensor that a loss would read."""
    return first_tensor(call_model(model, batch))
