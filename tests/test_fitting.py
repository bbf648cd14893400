"""Rounding that fits a layer's inputs: against brute force, and stored as it was searched with."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.errors import SearchSpaceError
from dqss.fitting import Moments, can_fit, fit_rounding, patches
from dqss.functional import choose_qparams
from dqss.lit.settings import PTQSettings
from dqss.mixing import Codes, Grid
from dqss.spec import PerChannel, QuantSpec
from dqss.trainable import TrainableSupernet
from search_spaces import uniform
from tests.support.nets import bundle_of, calibrated, cnn, images, prepared_supernet

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 6, 5)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2, dilation=(2, 1)), (3, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=(0, 1)), (3, 4, 9, 8)),
}


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Values that have much in common: rounding errors can make up for one another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) + 2 * torch.randn(shape[0], *[1] * (len(shape) - 1))


def grid_for(weight: Tensor, bits: int = 3) -> Grid:
    spec = QuantSpec(bits, True, PerChannel(0))
    rows = weight.detach().flatten(1)
    return Grid(*choose_qparams(rows.amin(1), rows.amax(1), spec), spec)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_say_how_far_the_output_moves(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), correlated(*shape)
    moments = Moments()
    for part in x.split(2):
        moments.add(layer, part)
    assert can_fit(layer) and moments.sum is not None
    error = torch.randn_like(layer.weight)
    with torch.no_grad():
        before = layer(x)
        layer.weight.add_(error)
        moved = (layer(x) - before).double().square().sum()
    rows = error.double().reshape(len(moments.sum), -1, moments.sum.shape[-1])
    torch.testing.assert_close((rows @ moments.sum * rows).sum(), moved, rtol=1e-4, atol=1e-6)


def test_large_pictures_are_sampled() -> None:
    assert patches(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 64, 64)).shape == (1, 256, 1)


def output_error(layer: nn.Module, codes: Codes, x: Tensor) -> float:
    weight = layer.weight
    with torch.no_grad():
        wanted = layer(x)
        layer.weight = nn.Parameter(codes.dequantize())
        found = float((layer(x) - wanted).square().mean())
    layer.weight = weight
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_moves_less_than_with_the_nearest_codes(name: str) -> None:
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    layer, x = build(), correlated(64, *shape[1:])
    moments = Moments()
    moments.add(layer, x)
    grid, mean = grid_for(layer.weight), moments.mean()
    assert mean is not None
    codes, nearest = fit_rounding(layer.weight, grid, mean), Codes.of(layer.weight, grid)
    assert (codes.integers.int() - nearest.integers.int()).abs().max() == 1
    assert output_error(layer, codes, x) < output_error(layer, nearest, x)


def test_no_single_flip_is_better_and_it_is_near_the_best_of_all() -> None:
    torch.manual_seed(2)
    spread = torch.randn(40, 8) @ torch.randn(8, 8)
    moments = (spread.mT @ spread).double()[None]
    best, found, plain = 0.0, 0.0, 0.0
    for seed in range(12):
        weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        grid = grid_for(weight)

        def cost(codes: Tensor, weight: Tensor = weight, grid: Grid = grid) -> float:
            error = (codes * grid.scale - weight).double()
            return float(error @ moments[0] @ error.mT)

        low = torch.floor(weight / grid.scale)
        every = [
            (low + torch.tensor([bits], dtype=torch.float32)).clamp(grid.spec.qmin, grid.spec.qmax)
            for bits in itertools.product((0, 1), repeat=8)
        ]
        chosen = fit_rounding(weight, grid, moments).integers.float()
        for j in range(8):
            flip = chosen.clone()
            flip[0, j] = (2 * low[0, j] + 1 - chosen[0, j]).clamp(grid.spec.qmin, grid.spec.qmax)
            assert cost(flip) >= cost(chosen) * (1 - 1e-9)
        best += min(cost(codes) for codes in every)
        found += cost(chosen)
        plain += cost(Codes.of(weight, grid).integers.float())
    assert best <= found < best + 0.4 * (plain - best)


SPACE = uniform(3, 4, ["mse", "adaround"], ["mse"])


def test_a_candidate_beside_plain_rounding_is_stored_as_it_was_searched_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = cnn(), images(40)
    prepared, supernet = prepared_supernet(model, inputs, SPACE)
    assert [m.products > 0 for m in supernet.preparation] == [True] * len(supernet.layers)
    for choice in (0, 1):
        assignment = {
            name: choice if name.endswith("weight") else 0 for name, _ in supernet.decisions.items()
        }
        bundle = bundle_of(prepared, supernet, assignment, inputs).save(tmp_path / str(choice))
        loaded = dqss.load(tmp_path / str(choice))
        tuned = [layer.weight.tuned for layer in loaded.strategy.layers.values() if layer.weight]
        assert tuned == [choice == 1] * len(tuned)
        with torch.no_grad(), supernet.assign(assignment):
            assert torch.equal(supernet(inputs), apply_strategy(model, loaded)(inputs))
        assert bundle.tensors.keys() == loaded.tensors.keys()
        if choice:
            pytest.importorskip("onnxruntime")
            dqss.export_model(model, loaded, tmp_path / "model.onnx", inputs[:16])


def test_it_is_searched_like_any_other() -> None:
    torch.manual_seed(0)
    settings = PTQSettings(steps=40, batch_size=8, discrete_every=0)
    result = dqss.search_ptq(cnn(), images(48), SPACE, settings)
    chosen = {layer.weight.algorithm for layer in result.bundle.strategy.layers.values() if layer.weight}
    assert chosen <= {"mse", "adaround"} and "adaround" in chosen


def test_layers_whose_inputs_cannot_be_taken_apart_keep_the_nearest_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    supernet = calibrated(model, images(4), space=SPACE)
    assert supernet.coverage.plain == ["0"]
    assert supernet.decisions["0.weight"].outcomes == 1 and supernet.decisions["2.weight"].outcomes == 2


def test_it_is_for_weights_that_do_not_learn() -> None:
    with pytest.raises(SearchSpaceError, match="adaround is for weights"):
        calibrated(cnn(), images(4), space=uniform(3, 4, ["mse"], ["adaround"]))
    with pytest.raises(SearchSpaceError, match="here they are trained"):
        TrainableSupernet(cnn(), SPACE)
