"""The same search on a CUDA device."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import dqss
from dqss.apply import apply_strategy
from dqss.discretize import RefineSettings
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.precision import full_precision
from dqss.repair import repair_strategy
from dqss.repair.cache import Store
from dqss.repair.chance import chances
from tests.repair.support import network, pictures, settings, strategy_for
from tests.support.nets import EVERY_PASS, calibrated, cnn, every_other, images, small_space

pytestmark = pytest.mark.gpu

CUDA = "cuda"
SETTINGS = PTQSettings(steps=6, batch_size=8, refine=RefineSettings(passes=4), discrete_every=3)


def test_search_on_cuda(tmp_path: Path) -> None:
    model, inputs = cnn(), images(32)
    result = search_ptq(model, inputs, small_space(3), SETTINGS, run_dir=tmp_path / "cuda")
    assert next(result.supernet.parameters()).is_cuda
    assert all(not parameter.is_cuda for parameter in model.parameters())  # the user's stays where it was
    for row in ("float", "best_uniform", "argmax", "refined", "searched", "soft"):
        assert math.isfinite(result.metrics[row]["selection"]["distance"])
    searched, best = (result.metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform"))
    assert searched <= best
    cpu = search_ptq(model, inputs, small_space(3), SETTINGS, trainer={"accelerator": "cpu"})
    ours, theirs = (found.bundle.strategy.model_dump() for found in (result, cpu))
    assert ours.keys() == theirs.keys() and ours["layers"].keys() == theirs["layers"].keys()
    assert ours["model"]["tensors"] == theirs["model"]["tensors"]

    loaded = dqss.load(tmp_path / "cuda")
    on_cpu, on_cuda = apply_strategy(model, loaded), apply_strategy(copy.deepcopy(model).cuda(), loaded)
    chosen = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(chosen):
        wanted = result.supernet(inputs.cuda())
        torch.testing.assert_close(on_cuda(inputs.cuda()), wanted)
        # A value at a tie may round to the other side on another device.
        near = (on_cpu(inputs) - wanted.cpu()).abs() < 1e-3 * wanted.abs().max().cpu()
        assert near.float().mean() > 0.9


def test_moving_a_calibrated_supernet() -> None:
    supernet, batch = calibrated(cnn(), images(8)), images(8)
    assignment = every_other(supernet)
    with torch.no_grad(), supernet.assign(assignment):
        wanted = supernet(batch)
        found = supernet.cuda()(batch.cuda()).cpu()
        again = supernet.cpu()(batch)
    assert torch.equal(again, wanted)
    assert ((found - wanted).abs() < 1e-3 * wanted.abs().max()).float().mean() > 0.9


def test_every_kind_of_grid_and_of_statistics_on_cuda() -> None:
    torch.manual_seed(0)
    model, batch = cnn(), images(16)
    space = small_space(
        [4, 16],
        EVERY_PASS,
        weight_granularity=["channel", "group"],
        weight_group_size=5,
        activation_granularity=["tensor", "channel"],
        activation_symmetric=[True, False],
        activation_signed=[True, False],
    )
    here = calibrated(model, *batch.split(4), space=space)
    there = calibrated(model.to(CUDA), *batch.to(CUDA).split(4), space=space)
    for ours, theirs in zip(there.quantizers(), here.quantizers(), strict=True):
        for k in range(len(ours.candidates)):
            # The backward pass adds in another order; the best of nearly equal ranges may be another.
            slack = 0.05 if theirs[k].needs_gradients else 1e-5
            torch.testing.assert_close(ours[k].scale.cpu(), theirs[k].scale, rtol=slack, atol=0)
    for mode in ("relaxed", "discrete"):
        with torch.no_grad(), there.mode(mode):
            assert torch.isfinite(there(batch.to(CUDA))).all()


def test_products_on_cuda() -> None:
    """Fused attention has other kernels there; quantized, it is computed from its parts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, batch = nn.Sequential(layer, nn.Linear(8, 3)).eval(), torch.randn(6, 5, 8)
    result = search_ptq(model, batch, small_space(6, products=True), SETTINGS)
    assert list(result.supernet.products) == ["0.self_attn.product0"]
    quantizers = [q for product in result.supernet.products.values() for _, q in product.operands()]
    assert len(quantizers) == 4 and all(quantizer[0].scale.is_cuda for quantizer in quantizers)
    chosen = result.discretized.assignments[result.discretized.exported]
    applied = apply_strategy(copy.deepcopy(model).cuda(), result.bundle)
    with torch.no_grad(), result.supernet.assign(chosen):
        torch.testing.assert_close(applied(batch.cuda()), result.supernet(batch.cuda()))
    with torch.no_grad(), result.supernet.mode("float"):
        torch.testing.assert_close(result.supernet(batch.cuda()).cpu(), model(batch), rtol=1e-3, atol=1e-3)


def test_same_seed_same_strategy_on_cuda() -> None:
    model, inputs = cnn(), images(32)
    results = [search_ptq(model, inputs, small_space(3), SETTINGS, seed=2) for _ in range(2)]
    choices = [list(result.bundle.strategy.choices()) for result in results]
    assert [c[:2] for c in choices[0]] == [c[:2] for c in choices[1]]


def test_convolutions_are_exact_on_cuda() -> None:
    """TF32 cuts operands to eleven bits, on by default; then no integer runtime gives the same sums."""
    torch.manual_seed(0)
    layer, batch = nn.Conv2d(64, 64, 3, bias=False).to(CUDA), torch.randn(8, 64, 16, 16, device=CUDA)
    with torch.no_grad(), full_precision():
        found = layer(batch).double()
        wanted = layer.double()(batch.double())
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_repair_on_cuda() -> None:
    """Blocks come nearer there too, and what was found is used where it is loaded, on the CPU say."""
    model, inputs = network(), pictures()
    bundle = strategy_for(model, inputs)
    options = settings(iterations=100, learn_steps=True, bias_correction=True)
    found = repair_strategy(model, bundle, inputs, options, device=torch.device(CUDA))
    assert all(not tensor.is_cuda for tensor in found.bundle.tensors.values())
    assert sum(errors.kept for errors in found.errors.values()) >= 3
    assert all(errors.held_out[1] < errors.held_out[0] for errors in found.errors.values() if errors.kept)
    others = pictures(64, seed=99)
    with torch.no_grad():
        wanted = model(others)
        plain, tuned = (
            float((apply_strategy(model, one)(others) - wanted).square().mean())
            for one in (bundle, found.bundle)
        )
    assert tuned < 0.8 * plain


def test_what_blocks_are_fed_with_is_on_the_device_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(CUDA)
    store = Store(1 << 20, device=device)
    first = store.empty((4, 5), torch.float32)
    assert first.is_cuda and store.used == 0
    monkeypatch.setattr("dqss.repair.cache._free", lambda device: 100)
    assert not store.empty((4, 5), torch.float32).is_cuda and store.used == 80
    on_device = chances((1000, 100), 0.25, torch.Generator(device).manual_seed(0))
    assert on_device.is_cuda and abs(float(on_device.double().mean()) - 0.25) < 0.01
