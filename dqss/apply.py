"""A strategy and a model, to a fixed quantized network; and a supernet to a strategy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dqss import quantizers
from dqss.arithmetic import EXACT, FAKE_QUANTIZED, Arithmetic, IntegerKernels
from dqss.arithmetic.attach import attach_exact, attach_kernels
from dqss.arithmetic.readers import reading
from dqss.attach import attach_input, attach_output, forbid_nested
from dqss.bundle import Bundle
from dqss.calls import call_model
from dqss.choice import OUTPUT, LayerStrategy, PointStrategy, ProductStrategy, TensorChoice
from dqss.errors import StrategyError
from dqss.functional import channel_count
from dqss.layers import input_shape, searchable_layers
from dqss.measure import home, to_device
from dqss.mixed import MixedQuantizer, MixedWeight
from dqss.mixing import Codes
from dqss.points import SearchablePoint
from dqss.prepare import Prepared, fingerprint, prepare
from dqss.products import ProductQuantizer, SearchableProduct, attach_products, can_attach
from dqss.signature import describe_inputs, example_inputs
from dqss.spec import PerTensor, Role
from dqss.strategy import ModelInfo, Strategy
from dqss.supernet import Assignment, Supernet

STATE = "state."
"""What tuned tensors of the network are called in a bundle, before their own names."""


def make_bundle(
    supernet: Supernet,
    assignment: Assignment,
    prepared: Prepared,
    model: ModelInfo,
    inputs: Any,
    state: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> Bundle:
    """Write down ``assignment`` of a calibrated supernet.

    Args:
        supernet: calibrated.
        assignment: an option for every decision.
        prepared: what the supernet was built on.
        model: where the network came from; hashes and recipe are filled in here.
        inputs: one batch; its shapes and types are recorded.
        state: tensors of the prepared network where they are not those of the original any more:
            tuned weights, statistics of batch norms.
        fields: the remaining fields of :class:`dqss.strategy.Strategy`.
    """
    layers: dict[str, LayerStrategy] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in supernet.layers.items():
        choices: dict[str, TensorChoice] = {}
        for role, quantizer in (("weight", layer.weight), ("activation", layer.activation)):
            if quantizer is not None:
                choices[role] = _choice(quantizer, assignment)
                tensors |= _qparams(f"{name}.{role}", quantizer, assignment)
            if isinstance(quantizer, MixedWeight):
                codes = quantizer.fitted_codes(assignment[quantizer.decision.name])
                if codes is not None:
                    tensors[f"{name}.weight.codes"] = codes.cpu().clone()
                    choices[role] = choices[role].model_copy(update={"tuned": True})
        layers[name] = LayerStrategy(weight=choices.get("weight"), activation=choices.get("activation"))
    chosen: dict[str, dict[str, TensorChoice]] = {}
    both: dict[str, SearchableProduct | SearchablePoint] = {**supernet.products, **supernet.points}
    for name, each in both.items():
        chosen[name] = {role: _choice(quantizer, assignment) for role, quantizer in each.operands()}
        for role, quantizer in each.operands():
            tensors |= _qparams(f"{name}.{role}", quantizer, assignment)
    products = {n: ProductStrategy(kind=p.kind, operands=chosen[n]) for n, p in supernet.products.items()}
    points = {n: PointStrategy(kind=p.kind, operands=chosen[n]) for n, p in supernet.points.items()}
    info = model.model_copy(
        update={
            "weights_sha256": prepared.weights_sha256,
            "tensors": prepared.fingerprints,
            "prepare": prepared.recipe,
            "input": {**model.input, "signature": describe_inputs(inputs)},
        }
    )
    tensors |= {f"{STATE}{key}": tensor.detach().cpu().clone() for key, tensor in (state or {}).items()}
    ties = [list(names) for names in (*supernet.coverage.tied, *supernet.coverage.ties)]
    return Bundle(
        Strategy(model=info, layers=layers, products=products, points=points, ties=ties, **fields), tensors
    )


def _qparams(name: str, quantizer: MixedQuantizer, assignment: Assignment) -> dict[str, Tensor]:
    grid = quantizer[assignment[quantizer.decision.name]].grid()
    return {
        f"{name}.scale": grid.scale.detach().cpu().clone(),
        f"{name}.zero_point": grid.zero_point.detach().cpu().clone(),
    }


def _choice(quantizer: MixedQuantizer, assignment: Assignment) -> TensorChoice:
    decision = quantizer.decision
    index = assignment[decision.name]
    probabilities = decision.probabilities()
    outcome = decision.outcome.tolist()  # an option that is alike is no other choice
    others = [p for k, p in enumerate(probabilities) if outcome[k] != outcome[index]]
    return TensorChoice.of(
        quantizer[index].candidate,
        decision=decision.name,
        probability=probabilities[index],
        margin=probabilities[index] - max(others, default=0.0),
    )


@torch.no_grad()
def apply_strategy(
    model: nn.Module, bundle: Bundle, force: bool = False, arithmetic: Arithmetic = FAKE_QUANTIZED
) -> nn.Module:
    """Rebuild the quantized network that was searched, bit for bit on the CPU.

    Needs no data. ``model`` is not changed; the result is a plain module in ``eval()`` whose
    weights hold their quantized values, frozen, and whose layers quantize their input (and what else
    the strategy has points for).

    Args:
        model: the trained float network, as it was given to the search.
        bundle: from :func:`dqss.load` or a search.
        force: apply also to other weights (scales then may not fit).
        arithmetic: what it is computed with; :data:`dqss.arithmetic.ONNXRUNTIME` computes what the integer
            kernels of that runtime do, on any machine, wherever the strategy leaves it integers, and
            :data:`dqss.arithmetic.EXACT` what a file for ``target=generic`` does in any runtime.

    Raises:
        StrategyError: for another model, or other weights, naming the layers, products or points that differ.
    """
    strategy = bundle.strategy
    if not force:
        _check_weights(model, strategy.model.tensors)
    example = example_inputs(cast("dict[str, Any]", strategy.model.input.get("signature", {})))
    fixed = prepared_network(model, bundle)
    forbid_nested(fixed)
    layers = searchable_layers(fixed)
    missing = [name for name in strategy.layers if name not in layers]
    if missing:
        raise StrategyError(
            f"the strategy is for another model: it has no layer {missing[0]!r}"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    kernels = arithmetic if isinstance(arithmetic, IntegerKernels) else None
    seen = None if kernels is None else reading(fixed.eval(), bundle, to_device(example, home(model)))
    for name, choice in strategy.layers.items():
        module, info = layers[name]
        _quantize_weight(module, name, bundle)
        if choice.activation is not None:
            shape = input_shape(module, info)
            quantizer = _quantizer(bundle, name, "activation", choice.activation, shape)
            attach_input(module, quantizer.to(home(module)))
    if strategy.products or strategy.points:
        _attach_products(fixed, bundle)
        _attach_outputs(fixed, bundle)
    if kernels is not None and seen is not None:
        attach_kernels(fixed, bundle, seen, kernels)
    if arithmetic == EXACT:
        attach_exact(fixed, bundle)
    if strategy.products or strategy.points:
        # Only a pass shows whether the network multiplies and adds as it did.
        call_model(fixed.eval(), to_device(example, home(model)))
    # As in the supernet: torch chooses kernels, and so roundings, by what requires gradients.
    return fixed.eval().requires_grad_(False)


@torch.no_grad()
def with_weights(model: nn.Module, bundle: Bundle) -> nn.Module:
    """The canonical network with quantized weights (and corrected biases), and activations in float.

    Args:
        model: the trained float network; it is not changed.
        bundle: of a strategy for it.
    """
    network = prepared_network(model, bundle)
    modules = dict(network.named_modules())
    for name in bundle.strategy.layers:
        _quantize_weight(modules[name], name, bundle)
    return network.eval().requires_grad_(False)


def _quantize_weight(module: nn.Module, name: str, bundle: Bundle) -> None:
    choice = bundle.strategy.layers[name]
    if choice.weight is not None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        # A new parameter, so that a tied embedding keeps its own float values.
        values = weight_codes(bundle, name, weight).dequantize().to(weight.dtype)
        module.weight = nn.Parameter(values, requires_grad=False)
    if choice.bias_corrected:
        _replace_bias(module, name, bundle.tensors[f"{name}.bias"])


def weight_codes(bundle: Bundle, layer: str, weight: Tensor) -> Codes:
    """The integer codes of a layer's weight: those of the nearest values, or as they were tuned.

    Args:
        bundle: has a choice for the weight.
        layer: its name.
        weight: the float one.

    Raises:
        StrategyError: where the choice is for a weight of another shape.
    """
    choice = bundle.strategy.layers[layer].weight
    assert choice is not None
    quantizer = _quantizer(bundle, layer, "weight", choice, weight.shape).to(weight.device)
    if not choice.tuned:
        return quantizer.codes(weight)
    codes = bundle.tensors[f"{layer}.weight.codes"]
    if codes.shape != weight.shape:
        raise StrategyError(
            f"the strategy is for another model: it has codes {list(codes.shape)} for the weight of "
            f"{layer!r}, which has the shape {list(weight.shape)} here"
        )
    return Codes(codes.to(weight.device), quantizer.grid())


def _replace_bias(module: nn.Module, name: str, bias: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    channels = next(getattr(module, key) for key in ("out_channels", "out_features") if hasattr(module, key))
    if len(bias) != channels:
        raise StrategyError(
            f"the strategy is for another model: it has a bias of {len(bias)} values for {name!r}, "
            f"which has {channels} channels here"
        )
    module.bias = nn.Parameter(bias.to(weight), requires_grad=False)


def prepared_network(model: nn.Module, bundle: Bundle) -> nn.Module:
    """The canonical float network of a strategy, with its tuned tensors where it has some.

    Raises:
        StrategyError: where those do not fit.
    """
    signature = cast("dict[str, Any]", bundle.strategy.model.input.get("signature", {}))
    example = to_device(example_inputs(signature), home(model))
    network = prepare(model, example, recipe=bundle.strategy.model.prepare).model
    state = {key.removeprefix(STATE): t for key, t in bundle.tensors.items() if key.startswith(STATE)}
    if state:
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            words = " ".join(str(error).split()[:24])
            raise StrategyError(f"the strategy's tuned weights are for another model: {words}") from error
    return network


def _attach_products(model: nn.Module, bundle: Bundle) -> None:
    modules, place = dict(model.named_modules()), home(model)
    by_owner: dict[tuple[str, str], dict[int, ProductQuantizer]] = {}
    strategy = bundle.strategy
    points = {name: point for name, point in strategy.points.items() if point.kind != OUTPUT}
    both: dict[str, ProductStrategy | PointStrategy] = {**strategy.products, **points}
    for name, choice in both.items():
        word = "point" if isinstance(choice, PointStrategy) else "product"
        owner, _, last = name.rpartition(".")
        found = re.fullmatch(rf"{word}(\d+)", last)
        if found is None or owner not in modules or not can_attach(modules[owner]):
            raise StrategyError(f"the strategy is for another model: it has no {word} {name!r}")
        operands = {
            operand: _quantizer(bundle, name, operand, chosen, torch.Size([1]))
            for operand, chosen in choice.operands.items()
        }
        quantizer = ProductQuantizer(name, choice.kind, operands).to(place)
        by_owner.setdefault((owner, word), {})[int(found[1])] = quantizer
    for (owner, _), products in by_owner.items():
        attach_products(modules[owner], products)


def _attach_outputs(model: nn.Module, bundle: Bundle) -> None:
    layers, place = searchable_layers(model), home(model)
    for name, point in bundle.strategy.points.items():
        if point.kind == OUTPUT:
            if name not in layers:
                raise StrategyError(f"the strategy is for another model: it has no layer {name!r}")
            for role, choice in point.operands.items():
                quantizer = _quantizer(bundle, name, role, choice, torch.Size([1])).to(place)
                attach_output(layers[name][0], quantizer)


def _quantizer(
    bundle: Bundle, layer: str, role: str, choice: TensorChoice, shape: torch.Size
) -> quantizers.Quantizer:
    scale = bundle.tensors[f"{layer}.{role}.scale"]
    quantizer = quantizers.build(
        choice.candidate(), len(scale), Role.WEIGHT if role == "weight" else Role.ACTIVATION
    )
    granularity = quantizer.candidate.spec.granularity
    fits = isinstance(granularity, PerTensor) or -len(shape) <= granularity.axis < len(shape)
    if not fits or channel_count(shape, granularity) != len(scale):
        raise StrategyError(
            f"the strategy is for another model: it has {len(scale)} scales for the {role} of {layer!r}, "
            f"which has the shape {list(shape)} here"
        )
    quantizer.load_grid(scale, bundle.tensors[f"{layer}.{role}.zero_point"])
    return quantizer


def _check_weights(model: nn.Module, expected: Mapping[str, str]) -> None:
    found = fingerprint(model)
    if found == dict(expected):
        return
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise StrategyError(
            f"the strategy is for another model: {len(odd)} tensors are in only one of them, "
            f"such as {odd[0]!r}"
        )
    differ = [name for name in expected if found[name] != expected[name]]
    shown = ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
    raise StrategyError(f"the model has other weights than were searched: {shown}; force=true applies anyway")
