"""Activations searched again, around weights that were tuned after the first search.

A search measures its options around weights with nearest codes. Learned rounding makes other weights of them,
and what activations suited the former need not suit the latter (``experiments/repair``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqss.apply import apply_strategy, make_bundle, prepared_network, with_weights
from dqss.bundle import Bundle
from dqss.choice import TensorChoice
from dqss.io import ensure_folder
from dqss.layers import searchable_layers
from dqss.lit.build import build
from dqss.lit.choose import choose
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.space import Rule, SearchSpace, point_info, product_info
from dqss.spec import Candidate

FOLDER = "again"
"""Below the run folder: what a search around tuned weights needs to go on."""
_PARTS = ("refine", "select")


def search_activations(
    model: nn.Module,
    bundle: Bundle,
    samples: Samples,
    space: SearchSpace,
    settings: PTQSettings,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    *,
    seed: int,
    folder: Path | None,
    device: torch.device,
) -> Bundle:
    """Search the activations of a strategy around its weights, which stay as they are.

    Grids are calibrated on the network with those weights; distances are taken to the float network. Every
    activation keeps its bits, and so the strategy its cost.

    Args:
        model: the trained float network, as it was given to the first search; it is not changed.
        bundle: what is searched around.
        samples: of the first search, in the same parts.
        space: whose candidates for activations there are.
        settings: of the first search.
        reporter: progress.
        trainer: further arguments of Lightning's trainer.
        seed: of batches and noise.
        folder: the run folder; None keeps everything in memory.
        device: where to work.

    Returns:
        The strategy with the activations found, where it is better in the mean of the part that is searched
        on and the selection part; otherwise ``bundle``.
    """
    network = with_weights(model, bundle)
    around = same_bits(space, bundle, network)
    if not around.rules:
        return bundle
    reporter.say("searching activations again, around the tuned weights")
    place = None if folder is None else ensure_folder(folder / FOLDER)
    settings = replace(settings, budget=None, repair=None, search_again=False, equalize=False, smooth=False)
    teacher = prepared_network(model, bundle).eval().requires_grad_(False).to(device)
    prepared, evaluator = build(network, samples, around, settings, seed, place, device, reporter, teacher)
    chosen = choose(evaluator, settings, seed, place, reporter, trainer).exported
    example = samples.batch(evaluator.parts["search"][:1])
    fields = bundle.strategy.model_dump(include={"dqss", "created", "search_space", "method"})
    searched = make_bundle(
        evaluator.supernet, chosen, prepared, bundle.strategy.model, example, seed=seed, budget=None, **fields
    )
    found = with_activations(bundle, searched)
    before = _distance(evaluator, apply_strategy(model, bundle).to(device))
    after = sum(evaluator.measure(chosen, part) for part in _PARTS) / len(_PARTS)
    better = after < before
    word = "taken" if better else "left"
    reporter.say(f"activations searched again: {before:.5f} -> {after:.5f}, {word}")
    return found if better else bundle


def _distance(evaluator: Evaluator, network: nn.Module) -> float:
    """Of a network from the float one, in the mean of both parts."""
    supernet = evaluator.supernet
    each = [evaluator.measure_in(lambda: supernet.running(network), part) for part in _PARTS]
    return sum(sum(one) / len(one) for one in each) / len(each)


def same_bits(space: SearchSpace, bundle: Bundle, network: nn.Module) -> SearchSpace:
    """The candidates for activations alone, of each tensor those with the bits that it has in ``bundle``."""
    rules = []
    for name, bits, candidates in _activations(space, bundle, network):
        kept = tuple(candidate for candidate in candidates if candidate.spec.bits == bits)
        if kept:
            rules.append(Rule(activation=kept, names=(escape(name),)))
    return replace(space, name=f"{space.name}, activations", rules=tuple(rules))


def _activations(
    space: SearchSpace, bundle: Bundle, network: nn.Module
) -> Iterator[tuple[str, int, tuple[Candidate, ...]]]:
    """Name, bits and candidates of every layer's input, product and point that is quantized."""
    layers, strategy = searchable_layers(network), bundle.strategy
    for name, layer in strategy.layers.items():
        found = space.candidates(layers[name][1])
        if layer.activation is not None and found is not None:
            yield name, layer.activation.bits, found.activation
    for name, product in strategy.products.items():
        yield name, _bits(product.operands), space.product_candidates(product_info(name)) or ()
    for name, point in strategy.points.items():
        if name not in layers:  # the output of a layer follows the layer's own rule
            yield name, _bits(point.operands), space.point_candidates(point_info(name)) or ()


def _bits(operands: Mapping[str, TensorChoice]) -> int:
    return next(iter(operands.values())).bits


def with_activations(bundle: Bundle, searched: Bundle) -> Bundle:
    """``bundle`` with the activations of ``searched``, where that has some."""
    layers = {}
    own, other = bundle.strategy, searched.strategy
    for name, layer in own.layers.items():
        found = other.layers.get(name)
        taken = None if found is None else found.activation
        layers[name] = layer if taken is None else layer.model_copy(update={"activation": taken})
    strategy = own.model_copy(
        update={
            "layers": layers,
            "products": {**own.products, **other.products},
            "points": {**own.points, **other.points},
            "tensors_sha256": None,
        }
    )
    return Bundle(strategy, {**bundle.tensors, **searched.tensors})
