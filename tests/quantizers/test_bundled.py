"""Strategies that name algorithms that learn: written, read and applied like others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dqss import quantizers
from dqss.apply import apply_strategy
from dqss.bundle import Bundle
from dqss.quantizers import LearnedQuantizer
from dqss.spec import Role
from tests.support.nets import bundle_of, cnn, images, prepared_supernet, small_space


@pytest.mark.parametrize(("weight", "activation"), [("lsq", "pact"), ("dorefa", "dorefa"), ("tqt", "dsq")])
@torch.no_grad()
def test_applied_is_what_was_trained(weight: str, activation: str, tmp_path: Path) -> None:
    model, inputs = cnn().eval(), images(6)
    space = small_space(3, ["mse"], activation_symmetric=True, activation_signed=False)
    prepared, supernet = prepared_supernet(model, inputs, space)
    bundle = bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), inputs)
    layers, tensors, trained = dict(bundle.strategy.layers), dict(bundle.tensors), {}
    for name, layer in layers.items():
        assert layer.weight is not None and layer.activation is not None
        renamed = {"weight": weight, "activation": activation}
        layers[name] = layer.model_copy(
            update={
                role: getattr(layer, role).model_copy(update={"algorithm": kind})
                for role, kind in renamed.items()
            }
        )
        for role in Role:
            candidate = getattr(layers[name], role.value).candidate()
            scale = tensors[f"{name}.{role.value}.scale"]
            quantizer = quantizers.build(candidate, len(scale), role)
            assert isinstance(quantizer, LearnedQuantizer)
            # As a training would leave it: somewhere near where it started.
            quantizer.load_grid(scale, tensors[f"{name}.{role.value}.zero_point"])
            for parameter in quantizer.parameters():
                parameter.mul_(1.07)
            trained[name, role] = quantizer
            grid = quantizer.grid()
            tensors[f"{name}.{role.value}.scale"] = grid.scale.clone()
            tensors[f"{name}.{role.value}.zero_point"] = grid.zero_point.clone()
    strategy = bundle.strategy.model_copy(update={"layers": layers})
    replace(bundle, strategy=strategy, tensors=tensors).save(tmp_path)
    loaded = Bundle.load(tmp_path)
    fixed = apply_strategy(model, loaded)
    floating = dict(prepared.model.named_modules())
    seen = {}
    for name in layers:
        module = fixed.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        source = floating[name].parametrizations.weight.original
        assert torch.equal(module.weight, trained[name, Role.WEIGHT](source))
    fixed(inputs)
    for name in layers:  # quantized before this hook: what is on the grid stays
        quantizer = trained[name, Role.ACTIVATION]
        assert torch.equal(quantizer(seen[name]), seen[name]) and seen[name].unique().numel() <= 8
