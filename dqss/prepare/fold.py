"""Fold batch norms into the layers before them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.errors import StrategyError
from dqss.prepare.modules import (
    Layer,
    Transposed,
    has_own_forward,
    is_batch_norm,
    plain_kind,
    random_probe,
    replace,
)
from dqss.prepare.standardize import first_calls, is_affine_in_weight
from dqss.prepare.watch import Pair, find_pairs
from dqss.prepare.work import Work, difference, reproducible, tolerance

_TOLERANCE = 1e-4
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    weight, bias = cast("Tensor | None", norm.weight), cast("Tensor | None", norm.bias)
    return mean, variance, weight, bias, cast(float, norm.eps)


def folded_parameters(layer: Layer, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that equals ``layer`` followed by ``norm`` in eval mode.

    ``W' = W * s`` and ``b' = (b - mean) * s + beta`` with ``s = gamma / sqrt(var + eps)`` per output
    channel; computed in double precision, returned in the weight's dtype.
    """
    mean, variance, gamma, beta, eps = _statistics(norm)
    kept = layer.weight
    mean, variance = mean.detach().double().cpu(), variance.detach().double().cpu()
    scale = torch.rsqrt(variance + eps)
    if gamma is not None:
        scale = scale * gamma.detach().double().cpu()
    bias = -mean * scale
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double().cpu() * scale
    if beta is not None:
        bias = bias + beta.detach().double().cpu()
    weight = kept.detach().double().cpu()
    if isinstance(layer, Transposed):
        # [in, out / groups, ...]: the output channel is (group of the input, axis 1).
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        by_group = scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (grouped * by_group).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight.to(kept), bias.to(kept)


def _rest(norm: nn.Module, ndim: int) -> nn.Module | None:
    """What remains of a norm without its normalization: dropout and activation. None if unknown."""
    if type(norm) in _PLAIN:
        return nn.Identity()
    parts = [getattr(norm, key, None) for key in ("drop", "act")]
    kept = [p for p in parts if isinstance(p, nn.Module) and not isinstance(p, nn.Identity)]
    rest = nn.Sequential(*kept) if kept else nn.Identity()
    mean, variance, gamma, beta, eps = _statistics(norm)
    probe = random_probe((2, mean.numel(), *[3] * (ndim - 2)), mean)
    wanted = norm.forward(probe.clone())
    found = rest(F.batch_norm(probe, mean, variance, gamma, beta, False, 0.0, eps))
    same = isinstance(wanted, Tensor) and difference(wanted, found) <= tolerance(1e-5, mean)
    return rest.eval() if same else None


def _fold(work: Work, pair: Pair, rest: nn.Module) -> Callable[[], None]:
    """Fold one pair in place; returns what undoes it."""
    layer, norm = pair.layer, pair.norm
    weight, bias = layer.weight, layer.bias
    new_weight, new_bias = folded_parameters(layer, norm)
    layer.weight = nn.Parameter(new_weight, requires_grad=weight.requires_grad)
    trained = weight.requires_grad if bias is None else bias.requires_grad
    layer.bias = nn.Parameter(new_bias, requires_grad=trained)
    replace(work.model, norm, rest)

    def undo() -> None:
        layer.weight, layer.bias = weight, bias
        replace(work.model, rest, norm)

    return undo


def _fold_good(work: Work, folds: Sequence[tuple[Pair, nn.Module]]) -> list[str]:
    """Fold all that keep the model's output, by halving; returns the norms that had to stay."""
    undo = [_fold(work, pair, rest) for pair, rest in folds]
    if work.replay or work.verifies(work.model, _TOLERANCE):
        return []
    for step in reversed(undo):
        step()
    if len(folds) == 1:
        return [folds[0][0].norm_name]
    half = len(folds) // 2
    return _fold_good(work, folds[:half]) + _fold_good(work, folds[half:])


def _affine_pairs(work: Work, pairs: list[Pair]) -> list[Pair]:
    """Leave out layers that are not linear in their weight: a scaled weight would not scale them."""
    own = [pair.layer for pair in pairs if has_own_forward(pair.layer)]
    calls = first_calls(work, own) if own else {}

    def affine(layer: Layer) -> bool:
        if not has_own_forward(layer):
            return True
        call = calls.get(layer)
        if call is None:
            return False
        probe = next(call.sizes(layer))
        return is_affine_in_weight(layer, lambda: layer.forward(probe, *call.rest, **call.kwargs))

    with reproducible(work.model):
        return [pair for pair in pairs if affine(pair.layer)]


def fold_batch_norm(work: Work, recorded: Collection[str]) -> list[str] | None:
    """Fold each batch norm into the convolution or linear layer whose output it alone reads.

    Norms that cannot be folded (other positions, no running statistics) stay. A fold that changes
    the model's output by more than 1e-4 is undone, with a note.

    Args:
        work: the network at hand.
        recorded: on replay, the pairs to fold (``"layer>norm"``): which norms follow which layers
            may depend on the batch, so it is written down and not found again.

    Returns:
        The pairs that were folded, or None if there are none.
    """
    if not any(is_batch_norm(module) for module in work.model.modules()):
        return None
    pairs = _recorded_pairs(work, recorded) if work.replay else _affine_pairs(work, find_pairs(work))
    folds = []
    with reproducible(work.model):
        for pair in pairs:
            rest = _rest(pair.norm, pair.layer.weight.ndim)
            if rest is not None:
                folds.append((pair, rest))
    bad = _fold_good(work, folds) if folds else []
    if bad:
        work.notes.append(f"batch norms not folded, the output would change: {', '.join(bad)}")
    good = [f"{p.layer_name}>{p.norm_name}" for p, _ in folds if p.norm_name not in bad]
    return good or None


def _recorded_pairs(work: Work, recorded: Collection[str]) -> list[Pair]:
    modules = dict(work.model.named_modules())
    pairs = []
    for word in recorded:
        layer_name, _, norm_name = word.partition(">")
        layer, norm = modules.get(layer_name), modules.get(norm_name)
        if layer is None or plain_kind(layer) is None or norm is None or not is_batch_norm(norm):
            fold = f"{norm_name!r} into {layer_name!r}"
            raise StrategyError(f"the strategy is for another model: it folds {fold}")
        pairs.append(Pair(layer_name, norm_name, cast(Layer, layer), norm))
    return pairs
