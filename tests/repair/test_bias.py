"""Corrected biases put the means of all outputs where the float network has them."""

import torch
from torch import nn

import dqss
from dqss.apply import apply_strategy
from dqss.repair import RepairSettings, repair_strategy
from tests.repair.support import network, pictures, strategy_for

ONLY = RepairSettings(iterations=0, bias_correction=True)


def means(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Per channel, of all inputs in one batch."""
    found, handles = {}, []
    for name in names:

        def hook(module: nn.Module, args: object, output: torch.Tensor, name: str = name) -> None:
            found[name] = output.double().transpose(0, 1).flatten(1).mean(1)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(pictures())
    for handle in handles:
        handle.remove()
    return found


def test_means_of_all_layers_are_those_of_the_float_network() -> None:
    model = network()
    bundle = strategy_for(model, pictures(), weight_bits=2, bits=4)
    names = list(bundle.strategy.layers)
    exact = means(dqss.prepare.prepare(model, pictures(4)).model, names)
    before = means(apply_strategy(model, bundle), names)
    found = repair_strategy(model, bundle, pictures(), ONLY).bundle
    after = means(apply_strategy(model, found), names)
    for name in names:
        torch.testing.assert_close(after[name], exact[name], atol=1e-6, rtol=1e-5)
        assert (before[name] - exact[name]).abs().max() > 1e-3
        assert found.strategy.layers[name].bias_corrected


def test_a_layer_without_a_bias_gets_one_and_one_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.again(torch.relu(self.again(x)))))

    torch.manual_seed(0)
    model, inputs = Twice().eval(), torch.randn(40, 6)
    bundle = strategy_for(model, inputs, 2)
    found = repair_strategy(model, bundle, inputs, ONLY).bundle
    assert {name: layer.bias_corrected for name, layer in found.strategy.layers.items()} == {
        "again": False,
        "last": True,
    }
    with torch.no_grad():
        shift = apply_strategy(model, found)(inputs).mean(0) - model(inputs).mean(0)
    torch.testing.assert_close(shift, torch.zeros(3), atol=1e-6, rtol=0)
