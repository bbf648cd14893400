"""What all super-resolution networks share: by name, with weights, quantized, and given bad input."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dqss.errors import DataError, ModelError
from dqss.models.blocks import pixel_shuffle
from dqss.models.ditn import DITN
from dqss.models.edsr import EDSR
from dqss.models.rlfn import RLFN
from dqss.models.super_resolution import NETWORKS, super_resolution
from tests.support.nets import prepared_supernet, small_space


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_is_larger_by_the_scale(name: str, scale: int) -> None:
    loaded = super_resolution(name, scale)
    assert not loaded.module.training and loaded.input is not None and loaded.input.scale == scale
    with torch.no_grad():
        assert loaded.module(torch.rand(1, 3, 15, 17)).shape == (1, 3, 15 * scale, 17 * scale)


@pytest.mark.parametrize(("name", "peak"), [("rlfn", 255), ("ditn_tiny", 1), ("edsr_baseline", 255)])
def test_input_configuration_tells_the_range(name: str, peak: int) -> None:
    config = super_resolution(name).input
    assert config is not None and config.mean == (0, 0, 0)
    assert [1 / deviation for deviation in config.std] == [peak] * 3


def test_unknown_names_scales_and_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'rlfn_ntir' \\(did you mean 'rlfn_ntire'"):
        super_resolution("rlfn_ntir")
    for name in NETWORKS:
        with pytest.raises(ModelError, match=r"model\.scale=5: expected 2, 3 or 4"):
            super_resolution(name, 5)
    torch.save({"params": RLFN(2).state_dict()}, tmp_path / "x2.pth")
    with pytest.raises(ModelError, match=r"does not fit rlfn x4.*upsampler.*model\.name and model\.scale"):
        super_resolution("rlfn", 4, tmp_path / "x2.pth")
    super_resolution("rlfn", 2, tmp_path / "x2.pth")


@pytest.mark.parametrize("model", [RLFN(2, channels=4, blocks=1), DITN(2, channels=4), EDSR(2, channels=4)])
def test_inputs_that_do_not_fit_are_refused_by_name(model: nn.Module) -> None:
    name = type(model).__name__
    with pytest.raises(DataError, match=rf"{name} takes colour images.*\[1, 1, 20, 20\]: repeat the grey"):
        model(torch.rand(1, 1, 20, 20))
    with pytest.raises(DataError, match=rf"{name} takes colour images \[N, 3, H, W\], not \[3, 20, 20\]"):
        model(torch.rand(3, 20, 20))
    with pytest.raises(DataError, match=rf"{name} takes colour images.*\[1, 4, 20, 20\]"):
        model(torch.rand(1, 4, 20, 20))
    with pytest.raises(DataError, match=rf"{name} takes floating-point images, not torch.uint8"):
        model(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("model", "least"), [(RLFN(2, channels=4, blocks=1), 15), (DITN(2, channels=4, layers=1), 5)]
)
def test_images_that_are_too_small_are_refused_and_no_others(model: nn.Module, least: int) -> None:
    assert model(torch.rand(1, 3, least, least)).shape[2] == 2 * least
    for size in ((least - 1, 40), (40, least - 1)):
        with pytest.raises(DataError, match=f"at least {least}x{least} pixels, not {size[0]}x{size[1]}"):
            model(torch.rand(1, 3, *size))


def test_pixel_shuffle_puts_channels_beside_each_other() -> None:
    layer = pixel_shuffle(1, 2, outputs=1)
    with torch.no_grad():
        layer[0].weight.zero_()
        layer[0].bias.copy_(torch.arange(4.0))
    assert torch.equal(layer(torch.rand(1, 1, 1, 1))[0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "products"),
    [(RLFN(2, channels=4, blocks=1), 0), (DITN(2, channels=4, layers=1), 2), (EDSR(2, 4, 1), 0)],
)
def test_every_layer_is_searched(model: nn.Module, products: int) -> None:
    x = torch.rand(2, 3, 16, 16)
    expected = model.eval()(x)
    _, supernet = prepared_supernet(model, x, small_space(products=True))
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert sorted(supernet.layers) == sorted(layers) and len(supernet.products) == products
    with supernet.mode("float"):
        torch.testing.assert_close(supernet(x), expected, rtol=1e-4, atol=1e-5)
    with supernet.mode("relaxed"):
        assert not torch.allclose(supernet(x), expected, rtol=1e-4, atol=1e-5)
