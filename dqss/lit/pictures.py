"""What calibration inputs of networks that enlarge pictures must be, before hours are spent on them."""

from __future__ import annotations

import torch
from torch import nn

from dqss.calls import first_tensor
from dqss.models.blocks import SuperResolver
from dqss.models.tiling import check_range
from dqss.prepare.modules import unwrap
from dqss.samples import Samples


def check_pictures(model: nn.Module, samples: Samples) -> None:
    """Refuse inputs that a network of ours cannot take or whose range is not its own; of others, nothing.

    Raises:
        DataError: naming what is wrong and the way out.
    """
    network = unwrap(model)
    if not isinstance(network, SuperResolver):
        return
    extremes: list[torch.Tensor] = []
    for index in range(len(samples)):
        images = first_tensor(samples.batch([index]))
        network.check(images)
        extremes += torch.aminmax(images)
    # All of them together: one alone may well be dark.
    check_range(torch.stack(extremes), network)
