"""How far the weights of a supernet are from those that are in place, option by option."""

from __future__ import annotations

import torch
from torch import Tensor

from dqss.mixed import MixedWeight
from dqss.supernet import Assignment, Supernet


@torch.no_grad()
def distortion(supernet: Supernet, assignment: Assignment) -> dict[str, Tensor]:
    """Summed squared differences of each option's weights to those of the option assigned.

    Args:
        supernet: calibrated.
        assignment: an option for every decision.

    Returns:
        ``[K]``, fp64 on the CPU, in squared units of the weights, for every decision that is about weights
        alone, by its name; summed over the weights that share it.
    """
    found: dict[str, Tensor] = {}
    others = {q.decision.name for q in supernet.quantizers() if not isinstance(q, MixedWeight)}
    for quantizer in supernet.quantizers():
        name = quantizer.decision.name
        if isinstance(quantizer, MixedWeight) and name not in others:
            own = quantizer.stack.choose(assignment[name])
            options = range(len(quantizer.candidates))
            squares = [(quantizer.stack.choose(k) - own).double().square().sum() for k in options]
            found[name] = found.get(name, 0) + torch.stack(squares).cpu()
    return found
