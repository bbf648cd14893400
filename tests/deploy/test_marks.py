"""The marked copy is the simulation, and what it notes is what the simulation multiplies."""

import pytest
import torch

from dqss.apply import apply_strategy
from dqss.calls import call_model
from dqss.deploy.grids import Grids
from dqss.deploy.marks import Marked
from dqss.deploy.sizes import sizes_of
from dqss.functional import broadcast_channels, dequantize
from tests.deploy.support import bundle_for
from tests.support.nets import cnn, images, output, small_space
from tests.support.zoo import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_simulation_computes(name: str) -> None:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, small_space((3, 8), ["mse"], products=True))
    simulation = apply_strategy(model, bundle)
    marked = Marked(simulation, bundle.strategy)
    assert torch.equal(output(marked, inputs), output(simulation, inputs))
    assert marked.notes.codes is None


def test_it_notes_every_call_of_every_quantizer() -> None:
    torch.manual_seed(1)
    build, batch = NETWORKS["used twice"]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, small_space((3, 8), ["mse"]))
    simulation, grids = apply_strategy(model, bundle), Grids(bundle)
    marked, seen = Marked(simulation, bundle.strategy), list[torch.Tensor]()
    simulation.get_submodule("shared").register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with marked.notes.keeping_codes():
        call_model(marked, inputs)
        codes = dict(marked.notes.codes or {})
        call_model(marked, inputs)
        assert (marked.notes.codes or {}).keys() == codes.keys()  # a new pass, not a longer one
    call_model(simulation, inputs)
    assert set(codes) == {("shared.activation", 0), ("shared.activation", 1), ("head.activation", 0)}
    name = "shared.activation"
    parts = [
        broadcast_channels(p, (), grids.spec(name).granularity)
        for p in (grids.scale(name), grids.zero_point(name))
    ]
    for call, multiplied in enumerate(seen):
        assert torch.equal(dequantize(codes[name, call], *parts), multiplied)


@pytest.mark.parametrize(("bits", "quantized"), [(8, 312), (4, 156)])
def test_sizes_by_hand(bits: int, quantized: int) -> None:
    torch.manual_seed(2)
    model, inputs = cnn(), images(4)
    bundle = bundle_for(model, inputs, small_space(bits))
    simulation, grids = apply_strategy(model, bundle), Grids(bundle)
    scales = {name: len(grids.scale(name)) for name in grids.choices()}
    found = sizes_of(1000, simulation, bundle.strategy, scales)
    # 162 + 54 + 96 weights and 16 biases; a scale for each of 16 channels.
    assert found.floating == 4 * (312 + 16)
    assert found.estimate == quantized + 4 * 16 + 4 * 16


def test_a_shared_weight_counts_once() -> None:
    build, batch = NETWORKS["tied"]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, small_space(8))
    simulation, grids = apply_strategy(model, bundle), Grids(bundle)
    scales = {name: len(grids.scale(name)) for name in grids.choices()}
    found = sizes_of(1000, simulation, bundle.strategy, scales)
    # Layers of 6 x 6 that share a weight, with a bias each; a table of 11 x 6; a head that is its copy.
    assert found.floating == 4 * (36 + 12 + 66 + 66)
    assert found.estimate == 36 + 4 * 6 + 4 * 12 + 4 * 66 + 66 + 4 * 11
