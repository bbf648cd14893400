"""Assignments within a budget that are not searched by gradient: same candidates, same images.

Each gives every option a score, and the same integer program as the search takes the best scores
within the limits; ``random`` draws the scores, ``greedy`` does without the program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from dqss.attach import original_weight
from dqss.budget.limits import Limits
from dqss.budget.workload import activations
from dqss.measure import Evaluator, batches
from dqss.spec import Candidate
from dqss.supernet import Assignment, Supernet

Scores = dict[str, Tensor]


@torch.no_grad()
def weight_errors(supernet: Supernet) -> Scores:
    """Summed squared error of each weight with each of its options."""
    found = {}
    for layer in supernet.layers.values():
        if layer.weight is not None:
            original = original_weight(layer.module)
            options = range(len(layer.weight.candidates))
            errors = [(layer.weight.stack.choose(k) - original).double().square().sum() for k in options]
            found[layer.weight.decision.name] = torch.stack(errors).cpu()
    return found


@torch.no_grad()
def activation_errors(evaluator: Evaluator, images: int = 128, relative: bool = True) -> Scores:
    """Squared error of each activation with each of its options, on the first images.

    Relative to the activation's square, or the sum over its values for one image.
    """
    supernet = evaluator.supernet
    errors: Scores = {}
    power: dict[str, Tensor] = {}
    handles = []
    for _, quantizer in activations(supernet):

        def see(module: nn.Module, args: tuple[Tensor, ...], quantizer=quantizer) -> None:  # type: ignore[no-untyped-def]
            x, name = args[0], quantizer.decision.name
            each = [(quantizer[k](x) - x).double().square().sum() for k in range(len(quantizer.candidates))]
            errors[name] = errors.get(name, torch.zeros(len(each))) + torch.stack(each).cpu()
            power[name] = power.get(name, torch.zeros(())) + x.double().square().sum().cpu()

        handles.append(quantizer.register_forward_pre_hook(see))
    with supernet.mode("float"):
        for run in batches(range(min(images, len(evaluator.samples))), 32):
            supernet(evaluator.samples.batch(run).to(evaluator.device))
            evaluator.meter.forward(len(run))
    for handle in handles:
        handle.remove()
    count = min(images, len(evaluator.samples))
    return {name: total / (power[name] if relative else count) for name, total in errors.items()}


def sqnr(evaluator: Evaluator) -> Scores:
    """The inverse of the signal-to-quantization-noise ratio of every tensor (local, no gradients)."""
    supernet = evaluator.supernet
    powers = {
        layer.weight.decision.name: original_weight(layer.module).double().square().sum().cpu()
        for layer in supernet.layers.values()
        if layer.weight is not None
    }
    found = {name: errors / powers[name] for name, errors in weight_errors(supernet).items()}
    return found | activation_errors(evaluator)


def curvatures(evaluator: Evaluator, images: int = 256, seed: int = 0) -> dict[str, float]:
    """Mean curvature of KL(float || .) at the float network, by decision: trace of the Hessian a value.

    There the Hessian is the Fisher information, whose trace is the mean squared norm of the gradient
    of ``log p(y)`` with y drawn from the network's own output: no labels, no second derivatives.
    """
    supernet = evaluator.supernet
    weights = {
        layer.weight.decision.name: original_weight(layer.module)
        for layer in supernet.layers.values()
        if layer.weight is not None
    }
    draw = torch.Generator().manual_seed(seed)
    count = min(images, len(evaluator.samples))
    names = [*weights, *(quantizer.decision.name for _, quantizer in activations(supernet))]
    totals = dict.fromkeys(names, 0.0)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for index in range(count):
            with supernet.mode("float"), _inputs(supernet) as seen:
                image = evaluator.samples.batch([index]).to(evaluator.device)
                logits = supernet(image.requires_grad_())
            label = torch.multinomial(torch.softmax(logits.detach(), 1).cpu(), 1, generator=draw)
            loss = -torch.log_softmax(logits, 1).gather(1, label.to(logits.device)).sum()
            slopes = torch.autograd.grad(loss, [*weights.values(), *(x for _, x in seen)])
            for name, slope in zip([*weights, *(name for name, _ in seen)], slopes, strict=True):
                totals[name] += float(slope.double().square().sum()) / count / slope.numel()
            evaluator.meter.backward(1)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return totals


@contextmanager
def _inputs(supernet: Supernet) -> Iterator[list[tuple[str, Tensor]]]:
    """What comes to each quantizer of activations, with the name of its decision."""
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for _, quantizer in activations(supernet):

        def see(module: nn.Module, args: tuple[Tensor, ...], name: str = quantizer.decision.name) -> None:
            seen.append((name, args[0]))

        handles.append(quantizer.register_forward_pre_hook(see))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hessian(evaluator: Evaluator) -> Scores:
    """HAWQ-v2's sensitivity (arXiv 1911.03852): mean curvature times squared error, also of activations."""
    mean = curvatures(evaluator)
    errors = weight_errors(evaluator.supernet) | activation_errors(evaluator, relative=False)
    return {name: mean[name] * each for name, each in errors.items()}


def chance(supernet: Supernet, seed: int) -> Scores:
    """Scores at random: what the program makes of them is a random strategy near its limits."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(len(decision.options), generator=draw)
        for name, decision in supernet.decisions.items()
    }


def measured(evaluator: Evaluator, start: Assignment, part: str, images: int) -> Scores:
    """Distance with one tensor at a time at each of the widths of its algorithm, the rest as ``start``.

    Options of other algorithms, and all of other decisions, keep what they are: infinity but for the
    one in place.
    """
    base = evaluator.measure(start, part, images)
    found = {}
    for name, options in _widths(evaluator.supernet, start).items():
        score = torch.full((len(evaluator.supernet.decisions[name].options),), torch.inf, dtype=torch.float64)
        score[start[name]] = 0.0
        for option in options:
            if option != start[name]:
                score[option] = evaluator.measure({**start, name: option}, part, images) - base
        found[name] = score
    return found


def greedy(
    evaluator: Evaluator, start: Assignment, limits: Limits, scores: Mapping[str, Tensor]
) -> dict[str, int]:
    """Lower one tensor after the other by a width, where it costs least for what it saves, until it fits.

    Args:
        evaluator: of the supernet.
        start: too dear.
        limits: to keep.
        scores: of the widths of each tensor, see :func:`measured`.
    """
    current, supernet = dict(start), evaluator.supernet
    limit = limits.limits[0]
    while not limits.hold(current):
        best: tuple[float, str, int] | None = None
        for name, options in _widths(supernet, start).items():
            lower = [k for k in options if _bits(supernet, name, k) < _bits(supernet, name, current[name])]
            if lower:
                option = max(lower, key=lambda k, name=name: _bits(supernet, name, k))  # type: ignore[misc]
                saved = limit.cost.of(current) - limit.cost.of({**current, name: option})
                loss = float(scores[name][option] - scores[name][current[name]])
                if saved <= 0:
                    continue  # a tensor that the limit is not about
                if best is None or loss / saved < best[0]:
                    best = (loss / saved, name, option)
        assert best is not None, "nothing left to lower"
        current[best[1]] = best[2]
    return current


def _widths(supernet: Supernet, start: Assignment) -> dict[str, list[int]]:
    """The options of each decision that differ from the one in place by their width alone."""
    found: dict[str, list[int]] = {}
    for name, decision in supernet.decisions.items():
        options = [cast("Candidate", option) for option in decision.options]
        chosen = options[start[name]]
        alike = [(o.method, o.spec.scheme) == (chosen.method, chosen.spec.scheme) for o in options]
        found[name] = [k for k, same in enumerate(alike) if same]
    return found


def _bits(supernet: Supernet, name: str, option: int) -> int:
    return int(supernet.decisions[name].options[option].spec.bits)  # type: ignore[attr-defined]
