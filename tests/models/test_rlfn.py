"""RLFN against the published counts, weights and figures."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dqss.data.pictures import Pictures
from dqss.models.blocks import Frame
from dqss.models.rlfn import RLFN, _Attention, _cells, _stretch, _stretch_tile
from dqss.models.super_resolution import NETWORKS, super_resolution

COUNTS = {
    ("rlfn", 2): 526_856,
    ("rlfn", 4): 543_740,
    ("rlfn_s", 2): 454_620,
    ("rlfn_s", 4): 470_208,
    ("rlfn_ntire", 4): 317_218,
}
# Peak signal-to-noise ratio on luma, dB.
PUBLISHED = [
    ("rlfn", 4, "Set5", 32.24),
    ("rlfn", 4, "Set14", 28.62),
    ("rlfn", 2, "Set5", 38.07),
    ("rlfn_s", 4, "Set5", 32.24),
    ("rlfn_ntire", 4, "Set5", 32.10),
]


@pytest.mark.parametrize(("name", "scale"), COUNTS)
def test_parameter_counts(name: str, scale: int) -> None:
    assert sum(p.numel() for p in NETWORKS[name](scale).parameters()) == COUNTS[name, scale]


@pytest.mark.parametrize(("name", "scale"), [("rlfn", 2), ("rlfn", 4), ("rlfn_s", 4), ("rlfn_ntire", 4)])
def test_published_weights_load_strictly(shared_data: Path, name: str, scale: int) -> None:
    path = shared_data / "sr" / "weights" / f"{name}_x{scale}.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    module = NETWORKS[name](scale)
    module.load_state_dict(weights, strict=True)
    loaded = super_resolution(name, scale, path).module
    for key, value in module.state_dict().items():
        assert torch.equal(value, weights[key]) and torch.equal(value, loaded.state_dict()[key])


@torch.no_grad()
@pytest.mark.parametrize(("name", "scale", "test_set", "expected"), PUBLISHED)
def test_published_figures(shared_data: Path, name: str, scale: int, test_set: str, expected: float) -> None:
    folder = shared_data / "sr"
    loaded = super_resolution(name, scale, folder / "weights" / f"{name}_x{scale}.pth")
    data = Pictures(folder / "BSDS_train", folder / test_set)
    data.configure(loaded.input)
    label, make = data.metric()
    loader = data.val_dataloader()
    assert label == "psnr" and make is not None and loader is not None
    meter = make()
    for images, targets in loader:
        meter.update(loaded.module(images), targets)
    assert float(meter.compute()) == pytest.approx(expected, abs=0.01)


def test_smallest_image_is_one_window_of_the_attention() -> None:
    model = RLFN(scale=2, channels=4, blocks=1).eval()
    assert model.smallest == 15 and _cells(15) == 1
    assert model(torch.rand(1, 3, 15, 15) * 255).shape == (1, 3, 30, 30)
    with pytest.raises(RuntimeError):  # what torch itself would say one pixel below
        F.max_pool2d(F.conv2d(torch.rand(1, 1, 14, 15), torch.rand(1, 1, 3, 3), stride=2), 7, 3)


@pytest.mark.parametrize("pixels", [15, 16, 20, 21, 64, 131])
def test_cells_are_those_of_the_layers(pixels: int) -> None:
    strided = F.conv2d(torch.rand(1, 1, pixels, pixels), torch.rand(1, 1, 3, 3), stride=2)
    assert F.max_pool2d(strided, 7, 3).shape[2] == _cells(pixels)


@pytest.mark.parametrize("height", [15, 37, 128])
def test_stretching_a_tile_that_is_the_whole_is_bilinear_interpolation(height: int) -> None:
    x = torch.rand(2, 5, height, 44, dtype=torch.float64)
    coarse = torch.rand(2, 5, _cells(height), _cells(44), dtype=torch.float64)
    whole = _stretch(coarse, x, Frame(0, 0, height, 44))
    torch.testing.assert_close(whole, _stretch(coarse, x, None), rtol=0, atol=1e-12)


def test_stretching_a_tile_is_a_part_of_stretching_the_whole() -> None:
    coarse = torch.rand(1, 2, _cells(101), 3, dtype=torch.float64)
    whole = _stretch_tile(coarse, 2, 0, 101, 101)
    part = _stretch_tile(coarse[:, :, 4:], 2, 24, 101 - 24, 101)
    # Above, the pixels of these cells are displaced by up to 15; there the tile has no cells.
    torch.testing.assert_close(part[:, :, 22:], whole[:, :, 46:], rtol=0, atol=1e-12)


def test_reach_of_the_attention_is_the_farthest_pixel_and_no_farther() -> None:
    farthest = 0
    for length in range(15, 400):
        cells, pixels = _cells(length), torch.arange(length)
        low = ((pixels + 0.5) * cells / length - 0.5).clamp(min=0).floor().long()
        high = (low + 1).clamp(max=cells - 1)
        # Cell k is pooled from the 15 pixels from 6 k on; the 3x3 convolution mixes in its neighbours.
        first = 6 * (low - 1).clamp(min=0)
        last = 6 * (high + 1).clamp(max=cells - 1) + 14
        farthest = max(farthest, int((pixels - first).max()), int((last - pixels).max()))
    assert farthest == _Attention.reach


def test_attention_is_a_mask_between_zero_and_one() -> None:
    attention = RLFN(channels=4, blocks=1).block_1.esa
    with torch.no_grad():
        attention.conv4.weight.zero_()
        attention.conv4.bias.copy_(torch.tensor([0.0, 1.0, -50.0, 50.0]))
    x = torch.rand(1, 4, 20, 20)
    mask = torch.tensor([0.5, 1 / (1 + torch.e**-1), 0.0, 1.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(attention(x, None), x * mask)
