"""What units should give where the search has chosen to cut off inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqss.apply import apply_strategy, prepared_network
from dqss.bundle import Bundle
from dqss.repair import repair_strategy
from dqss.repair.clipping import clipping
from dqss.repair.found import input_quantizers
from search_spaces import uniform
from tests.repair.support import pictures, settings
from tests.support.nets import bundle_of, prepared_supernet


def cut_off(model: nn.Module) -> Bundle:
    """Inputs cut at their 90th percentile; sixteen bits, so that nothing but the cut matters."""
    space = uniform(16, 16, ["minmax"], [{"name": "percentile", "p": 90.0}])
    prepared, supernet = prepared_supernet(model, pictures(), space)
    return bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), pictures(4))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean() / other.square().mean())


@torch.no_grad()
def test_a_clipped_network_is_the_quantized_one_without_its_rounding(model: nn.Module) -> None:
    bundle, x = cut_off(model), pictures(16, seed=7)
    quantized, exact = apply_strategy(model, bundle), prepared_network(model, bundle).eval()
    float_output = exact(x)
    seen: dict[str, Tensor] = {}
    grids = {name: one.grid() for name, one in input_quantizers(quantized).items()}
    assert set(grids) == set(bundle.strategy.layers)
    with clipping(exact, grids):
        for name in grids:
            exact.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0]})
            )
        clipped = exact(x)
    assert distance(clipped, quantized(x)) < 1e-6 < 1e-3 < distance(clipped, float_output)
    for name, grid in grids.items():
        ends = [float((code - grid.zero_point) * grid.scale) for code in (grid.spec.qmin, grid.spec.qmax)]
        assert ends[0] <= float(seen[name].min()) and float(seen[name].max()) <= ends[1]
    assert torch.equal(exact(x), float_output)  # none of it is left


@pytest.mark.parametrize("blocks", [(), ("blocks.*",)])
def test_units_are_not_asked_for_what_was_cut_off(model: nn.Module, blocks: tuple[str, ...]) -> None:
    bundle = cut_off(model)
    options: dict[str, Any] = {"iterations": 1, "learning_rate": 1e-9, "blocks": blocks}
    plain = repair_strategy(model, bundle, pictures(), settings(**options))
    clipped = repair_strategy(model, bundle, pictures(), settings(**options, clipped_targets=True))
    assert all(errors.held_out[0] > 1e-3 for errors in plain.errors.values())
    assert all(errors.held_out[0] < 1e-6 for errors in clipped.errors.values())
