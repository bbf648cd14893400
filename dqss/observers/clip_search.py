"""Search for the clip range with the least true quantization error, for all channels at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dqss.functional import choose_qparams
from dqss.observers import loops
from dqss.observers.base import Statistics, bounded_range, full_range
from dqss.observers.compress import compress
from dqss.spec import QuantSpec

_CACHED = 1 << 15  # elements of a temporary on the CPU: cached, and too few to be split among threads
_LARGE = 1 << 24  # elsewhere, and where nothing passes through memory: few large kernels
_LONGEST = 4096  # sums of more are compiled to ones that are more exact, and several times slower
_COARSE, _FINE = 512, (1024, 2048)  # sizes of the samples that stand for longer ones
_LINE, _PLANE = 64, 21  # points along an end: one end to search, two ends to search
_STARTS = 2  # points of the coarse grid that are refined, besides the full range
_WINDOW = 0.125  # narrowest range looked at, in units of the order-p mean magnitude


def search_clip(stats: Statistics, spec: QuantSpec, order: float) -> tuple[Tensor, Tensor]:
    """The clip range that minimizes the weighted sum of ``|fake_quantize(x) - x| ** order``.

    A coarse geometric grid over the ends of the range (one end, or both tied together, on
    symmetric grids and for one-sided data; otherwise each on its own); its best points are
    refined, one end after the other, until the steps are small against those of the grid.
    Errors are those of the very functions that quantize later, on the values themselves or,
    where there are many of them, on a sample that stands for them; the finalists and min-max
    are compared on all of them.

    Args:
        stats: C channels.
        spec: the grid.
        order: the exponent, positive.

    Returns:
        ``(low, high)``, each ``[C]``, with an error that is never above min-max's.
    """
    scaled, unit = stats.normalized()
    full = torch.stack(full_range(scaled, spec), dim=-1)
    tied = (full == 0).any(dim=-1) | spec.mirrored
    ends = torch.empty_like(full)
    for group, joined in ((tied, True), (~tied, False)):
        if bool(group.any()):
            ends[group] = _search(scaled.channels(group), full[group], spec, order, joined)
    return bounded_range(ends[:, 0] * unit, ends[:, 1] * unit, stats, spec)


def _search(stats: Statistics, full: Tensor, spec: QuantSpec, order: float, tied: bool) -> Tensor:
    """The best ends ``[C, 2]`` inside ``full``; ``tied`` moves both by the same factor."""
    coarse, fine = compress(stats, _COARSE), compress(stats, _FINE[spec.bits > 6])
    fractions, step = _coarse_fractions(smallest_fractions(coarse, full, order), tied)
    errors = range_errors(coarse, fractions * full, spec, order)
    index = errors.topk(_STARTS, dim=0, largest=False).indices
    best = fractions.gather(0, index[..., None].expand(-1, -1, 2))
    best = torch.cat([best, torch.ones_like(best[:1])])
    for around in _neighbourhoods(step, spec, tied):
        best = _refine(best, around, fine, full, spec, order)
    finalists = torch.cat([torch.ones_like(best[:1]), best])
    errors = range_errors(stats, finalists * full, spec, order)
    index = errors.argmin(dim=0)[None, :, None].expand(-1, -1, 2)
    return finalists.gather(0, index)[0] * full


def smallest_fractions(stats: Statistics, full: Tensor, order: float) -> Tensor:
    """The narrowest ends worth a look, as fractions ``[C, 2]`` of the full ends ``[C, 2]``.

    A range much narrower than the order-p mean magnitude clips away nearly everything that the
    order-p error counts.
    """
    total = stats.counts.sum(dim=1).clamp(min=1)
    mean = (stats.values.abs().pow(order) * stats.counts).sum(dim=1).div(total).pow(1 / order)
    return torch.nan_to_num(_WINDOW * mean[:, None] / full.abs(), nan=0.5).clamp(2**-16, 0.5)


def qparam_errors(
    stats: Statistics, scale: Tensor, zero_point: Tensor, spec: QuantSpec, order: float
) -> Tensor:
    """Weighted sums of ``|fake_quantize(x) - x| ** order``, ``[G, C]``.

    Args:
        stats: C channels.
        scale, zero_point: ``[G, C]``, G quantizers for each channel.
        spec: the grid.
        order: the exponent.
    """
    candidates, channels = scale.shape
    n = stats.values.shape[1]
    kernel, work = loops.errors(float(order)), candidates * channels * n
    low, high = spec.qmin - zero_point, spec.qmax - zero_point
    # Single rows or columns, and sums that are long, would each be compiled anew, and gain little.
    fused = kernel.fuses(work) and channels > 1 and 1 < n <= _LONGEST
    run = partial(kernel, work) if fused else kernel.eager
    budget = _LARGE if fused or stats.values.device.type != "cpu" else _CACHED
    rows = min(channels, max(1, budget // n))
    depth = max(1, budget // (n * rows))
    if rows == channels and depth >= candidates:
        values, counts = stats.values.contiguous(), stats.counts.contiguous()
        found: Tensor = run(values, counts, scale.contiguous(), low, high)
        return found
    errors = torch.empty_like(scale)
    for c in range(0, channels, rows):
        values, counts = (part[c : c + rows].contiguous() for part in (stats.values, stats.counts))
        for g in range(0, candidates, depth):
            block = (slice(g, g + depth), slice(c, c + rows))
            grids = (part[block].contiguous() for part in (scale, low, high))
            errors[block] = run(values, counts, *grids)
    return errors


def range_errors(stats: Statistics, ends: Tensor, spec: QuantSpec, order: float) -> Tensor:
    """As :func:`qparam_errors`, for clip ranges ``[G, C, 2]``."""
    scale, zero_point = choose_qparams(ends[..., 0], ends[..., 1], spec)
    return qparam_errors(stats, scale, zero_point, spec, order)


def _coarse_fractions(smallest: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
    """Candidates ``[G, C, 2]`` as fractions of the full ends, and their ratio as a log ``[C, 2]``."""
    points = _LINE if tied else _PLANE
    step = smallest.log() / (points - 1)
    exponents = torch.arange(points, device=smallest.device)
    line = torch.exp(exponents[:, None, None] * step)
    if tied:
        return line, step
    line = torch.cat([line, torch.zeros_like(line[:1])])  # an end may be given up altogether
    shape = (points + 1, points + 1, -1)
    low, high = line[:, None, :, 0].expand(shape), line[None, :, :, 1].expand(shape)
    return torch.stack([low, high], dim=-1).flatten(0, 1)[:-1], step  # but not both


def _neighbourhoods(step: Tensor, spec: QuantSpec, tied: bool) -> Iterator[Tensor]:
    """Logs of the factors to try, ``[G, C, 2]``, around what was best, finer and finer.

    Channels whose steps are small enough stay where they are, whatever others need.

    Args:
        step: of the coarse grid, as a log, ``[C, 2]``.
        spec: the grid.
        tied: whether both ends move by the same factor.
    """
    line = torch.linspace(-1, 1, 9, device=step.device)
    reach, enough = 1.0, 0.25 / (spec.qmax - spec.qmin)
    if not tied:  # the zero point ties the ends together: at first both at once
        yield torch.cartesian_prod(line[::2], line[::2])[:, None] * step
        reach = 0.5
    largest = -step.amin(dim=1, keepdim=True)
    while bool((largest * reach > enough).any()):
        moved = torch.where(largest * reach > enough, reach * step, 0.0)
        if tied:
            yield line[:, None, None] * moved
        else:
            for end in torch.eye(2, device=step.device):
                yield line[:, None, None] * (moved * end)
        reach /= 4


def _refine(
    best: Tensor, around: Tensor, stats: Statistics, full: Tensor, spec: QuantSpec, order: float
) -> Tensor:
    """The best of each of ``best`` ``[S, C, 2]`` times ``exp(around)`` ``[G, C, 2]``."""
    tried = (best[None] * torch.exp(around)[:, None]).clamp(max=1.0)
    errors = range_errors(stats, tried.flatten(0, 1) * full, spec, order).view(tried.shape[:-1])
    index = errors.argmin(dim=0)[None, ..., None].expand(-1, -1, -1, 2)
    return tried.gather(0, index)[0]
