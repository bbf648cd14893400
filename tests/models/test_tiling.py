"""Tiles give the picture of the whole image."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dqss.data.paired_images import read_pixels
from dqss.errors import DataError, ModelError
from dqss.models.blocks import SuperResolver
from dqss.models.ditn import DITN, ChannelNorm
from dqss.models.edsr import EDSR
from dqss.models.rlfn import RLFN
from dqss.models.super_resolution import super_resolution
from dqss.models.tiling import Tiles, check_range, upscale


def lively(model: SuperResolver) -> SuperResolver:
    """In double precision, with no parameter that leaves a branch silent."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def small(name: str) -> SuperResolver:
    return {
        "rlfn": lambda: lively(RLFN(2, channels=6, blocks=2)),
        "ditn_real": lambda: lively(DITN(2, channels=6, layers=1)),
        "ditn": lambda: lively(DITN(3, units=2, normalize=ChannelNorm, channels=6, layers=1)),
        "edsr": lambda: lively(EDSR(4, channels=6, blocks=2)),
    }[name]()


def picture(model: SuperResolver, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, dtype=torch.float64) * model.peak


@pytest.mark.parametrize("name", ["rlfn", "ditn_real", "ditn", "edsr"])
@pytest.mark.parametrize("size", [20, 48, 1000])
def test_tiles_are_exact(name: str, size: int) -> None:
    model = small(name)
    # Neither side is a multiple of anything; the last tile along the width is five pixels wide.
    x = picture(model, 15, 245)
    whole = upscale(model, x)
    torch.testing.assert_close(upscale(model, x, Tiles(size)), whole, rtol=1e-9, atol=1e-9 * model.peak)


@pytest.mark.parametrize("name", ["rlfn", "ditn_real", "edsr"])
def test_tiles_are_exact_both_ways(name: str) -> None:
    model = small(name)
    x = picture(model, 121, 100)
    torch.testing.assert_close(
        upscale(model, x, Tiles(48)), upscale(model, x), rtol=1e-9, atol=1e-9 * model.peak
    )


@pytest.mark.parametrize("name", ["rlfn", "ditn_real", "edsr"])
def test_tiles_without_a_margin_are_not(name: str) -> None:
    model = small(name)
    x = picture(model, 16, 130)
    difference = upscale(model, x, Tiles(48, margin=0)) - upscale(model, x)
    assert difference.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["rlfn", "ditn_real", "ditn", "edsr"])
@pytest.mark.parametrize("length", [240, 251])
def test_nothing_beyond_the_reach_changes_a_pixel(name: str, length: int) -> None:
    model = small(name)
    x, scale = picture(model, 16, length), model.scale
    expected = model(x)
    for place in (0, 7, 100, length // 2, length - 1):
        first, last = max(0, place - model.reach), min(length, place + model.reach + 1)
        other = picture(model, 16, length)
        other[:, :, :, first:last] = x[:, :, :, first:last]
        column = slice(scale * place, scale * place + scale)
        torch.testing.assert_close(model(other)[..., column], expected[..., column], rtol=1e-9, atol=1e-9)


def test_published_network_tile_by_tile(shared_data: Path) -> None:
    folder = shared_data / "sr"
    model = super_resolution("rlfn_ntire", 4, folder / "weights" / "rlfn_ntire_x4.pth").module
    assert isinstance(model, RLFN)
    strip = read_pixels(folder / "Set14" / "x4" / "HR" / "011.png")[None, :, 200:248, :700].float()
    whole = upscale(model, strip)

    def worst(tiles: Tiles) -> float:
        return float((upscale(model, strip, tiles) - whole).abs().max()) / model.peak

    assert worst(Tiles(200)) < 1e-5
    # What far pixels do is small long before it is nothing; figures of a picture, not of a theorem.
    assert worst(Tiles(200, margin=96)) < 1e-4 < worst(Tiles(200, margin=24))


def test_tiles_that_are_no_tiles_are_refused() -> None:
    for size, margin in ((0, None), (8, -1)):
        with pytest.raises(ModelError, match="too small"):
            Tiles(size, margin)


def test_images_too_small_for_the_network_are_refused_tiled_or_not() -> None:
    model = small("rlfn")
    for tiles in (None, Tiles(6)):
        with pytest.raises(DataError, match="at least 15x15 pixels, not 14x40"):
            upscale(model, picture(model, 14, 40), tiles)


def test_images_in_another_range_are_refused() -> None:
    wide, narrow, x = RLFN(2, channels=4, blocks=1), DITN(2, channels=4, layers=1), torch.rand(1, 3, 16, 16)
    with pytest.raises(DataError, match=r"RLFN expects 0\.\.255: multiply them by 255"):
        upscale(wide, x)
    with pytest.raises(DataError, match=r"DITN expects 0\.\.1: divide them by 255"):
        upscale(narrow, 255 * x)
    for model in (wide, narrow):
        with pytest.raises(DataError, match="undo their normalization"):
            upscale(model, model.peak * (4 * x - 2))
        check_range(torch.zeros(1, 3, 16, 16), model)
        check_range(model.peak * (1.2 * x - 0.1), model)  # as bicubic resizing overshoots
