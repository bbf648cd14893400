"""Networks whose batch norms do something."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

Randomize = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Inputs are so small here that threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randomize() -> Randomize:
    """Fresh norms are the identity, which would hide every mistake of folding."""

    def change(model: nn.Module) -> nn.Module:
        for module in model.modules():
            mean = getattr(module, "running_mean", None)
            if mean is None:
                continue
            mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
        return model.eval()

    return change
