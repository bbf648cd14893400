"""Weights that are rounded so that a layer's output moves least: the objective of AdaRound, layer by layer.

With errors d of a row of weights and inputs x the output moves by ``E[(d x)^2] = d H d'`` with the second
moments ``H = E[x' x]`` of what the row is multiplied with (arXiv 2004.10568, eq. 14 and 21). The paper
relaxes the choice of up or down; here it is a descent over the weights one by one, which needs H alone
and no iterations over inputs, so that it can be made for every candidate before a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.mixing import Codes, Grid

POSITIONS = 256
"""Places of a picture that count, evenly spread: neighbours say much the same."""
LONGEST = 4608
"""Weights that make one output, at most: more second moments would take too much memory."""
SWEEPS = 20
DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: a few inputs do not span all directions."""


class Moments:
    """Second moments of what a layer's weights are multiplied with.

    Attributes:
        products: multiply-accumulates spent so far.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0
        self.products = 0

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """Add one call of ``layer`` with ``x``."""
        x = x.detach().to(torch.float32)
        if isinstance(layer, nn.Conv2d) and x.ndim == 3:
            x = x[None]
        for one in torch.split(x, 1):
            rows = patches(layer, one)
            groups, count, length = rows.shape
            found = (rows.mT @ rows).double()
            self.sum = found if self.sum is None else self.sum + found
            self.count += count
            self.products += groups * count * length * length

    def mean(self) -> Tensor | None:
        """``[groups, n, n]`` fp64 with its damping; None where nothing was seen."""
        if self.sum is None:
            return None
        found = self.sum / self.count
        level = found.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
        return found + torch.diag_embed((DAMPING * level).expand(-1, found.shape[-1]))


def can_fit(layer: nn.Module) -> bool:
    """Whether the inputs of ``layer`` can be taken apart: plain linear layers and 2d convolutions."""
    # By its forward: a parametrized layer is of a class of its own.
    forward = type(layer).forward
    if isinstance(layer, nn.Linear) and forward is nn.Linear.forward:
        return layer.in_features <= LONGEST
    if not isinstance(layer, nn.Conv2d) or forward is not nn.Conv2d.forward:
        return False
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return False
    return layer.weight[0].numel() <= LONGEST


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with, ``[groups, places, n]``."""
    if isinstance(layer, nn.Conv2d):
        size, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        columns = F.unfold(x, size, dilation, layer.padding, stride)  # type: ignore[arg-type]
        rows = columns.reshape(len(x), layer.groups, -1, columns.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)
    else:
        rows = x.reshape(1, -1, x.shape[-1])
    step = -(-rows.shape[1] // (POSITIONS * len(x)))
    return rows[:, ::step]


@contextmanager
def watching(layers: Mapping[str, tuple[nn.Module, Moments]]) -> Iterator[None]:
    """Inside, every call of the layers adds to their moments."""
    with ExitStack() as stack:
        for layer, moments in layers.values():

            def hook(module: nn.Module, args: Any, kwargs: Any, moments: Moments = moments) -> None:
                given = args[0] if args else next(iter(kwargs.values()))
                moments.add(module, given)

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@torch.no_grad()
def fit_rounding(weight: Tensor, grid: Grid, moments: Tensor) -> Codes:
    """Codes next to the weights whose squared error of the output, ``sum d H d'``, is a local minimum.

    From the nearest codes on, each weight in its turn takes the other one of its two codes where that
    makes the sum smaller, until none does.

    Args:
        weight: ``[O, ...]``.
        grid: to round to.
        moments: H ``[groups, n, n]`` fp64.
    """
    spec, groups = grid.spec, len(moments)
    scale, zero_point = (part.double().expand(weight.shape) for part in grid.shaped(weight.shape))
    # In the precision in which codes are made everywhere else, so that "nearest" is the same.
    places = weight.detach().to(torch.float32) / grid.shaped(weight.shape)[0]
    nearest = torch.round(places).double()
    other = nearest + torch.where(places.double() > nearest, 1.0, -1.0)
    codes, other = ((part + zero_point).clamp(spec.qmin, spec.qmax) for part in (nearest, other))
    errors = _rows((codes - zero_point) * scale - weight.double(), groups)
    steps = _rows((other - codes) * scale, groups)
    flipped = torch.zeros_like(steps, dtype=torch.bool)
    slope = errors @ moments
    for _ in range(SWEEPS):
        before = flipped.clone()
        for j in range(errors.shape[-1]):
            step = steps[..., j]
            gain = 2 * step * slope[..., j] + step.square() * moments[:, j, j, None]
            taken = torch.where(gain < 0, step, 0.0)
            slope += taken[..., None] * moments[:, None, j, :]
            flipped[..., j] ^= gain < 0
            steps[..., j] = torch.where(gain < 0, -step, step)
        if torch.equal(before, flipped):
            break
    chosen = torch.where(flipped.reshape(weight.shape), other, codes)
    return Codes.from_integers(chosen.to(torch.float32), grid)


def _rows(values: Tensor, groups: int) -> Tensor:
    """``[O, ...]`` as ``[groups, O / groups, n]``."""
    return values.reshape(groups, len(values) // groups, -1)
