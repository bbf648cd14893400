"""Quality of pictures against formulas and an independent SSIM."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dqss.errors import DataError
from dqss.image_quality import PsnrY, SsimY, luma, psnr_y, ssim_y, to_pixels


def pictures(count: int = 2, height: int = 40, width: int = 36, noise: float = 12) -> tuple[Tensor, Tensor]:
    """Whole numbers in 0..255: smooth pictures, and noisy versions."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    smooth = 128 + 90 * torch.sin(rows / 5) * torch.cos(columns / 7)
    targets = torch.stack([smooth, smooth.flip(0), smooth.flip(1)]).expand(count, 3, height, width)
    images = targets + noise * torch.randn(count, 3, height, width)
    return images.round().clamp(0, 255), targets.round().clamp(0, 255)


def test_luma_runs_from_16_to_235() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    found = luma(colours.double().view(5, 3, 1, 1)).flatten()
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_psnr_of_a_constant_error() -> None:
    images = torch.full((1, 3, 20, 20), 100.0)
    for error in (1, 5, -20):
        found = psnr_y(images + error, images, peak=255, border=2)
        in_luma = abs(error) * 219 / 255
        assert float(found) == pytest.approx(20 * math.log10(255 / in_luma), abs=1e-5)


def test_outputs_are_clipped_and_rounded_to_eight_bits() -> None:
    outputs = torch.tensor([-0.3, 0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1.0, 7.0])
    assert to_pixels(outputs, 1.0).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_pixels(outputs.double() * 255, 255.0).tolist() == [0, 0, 0, 1, 255, 255]
    images, targets = pictures()
    values = [psnr_y(images * p / 255, targets * p / 255, peak=p, border=2) for p in (1.0, 255.0)]
    torch.testing.assert_close(values[0], values[1])


def test_equal_pictures_are_infinitely_good() -> None:
    images, _ = pictures()
    assert psnr_y(images, images, peak=255, border=4).isinf().all()
    torch.testing.assert_close(ssim_y(images, images, peak=255, border=4), torch.ones(2))


@pytest.mark.parametrize("border", [1, 4])
def test_the_border_does_not_count(border: int) -> None:
    images, targets = pictures()
    spoilt = images.clone()
    spoilt[:, :, :border], spoilt[:, :, -border:] = 0, 0
    spoilt[..., :border], spoilt[..., -border:] = 255, 255
    for quality in (psnr_y, ssim_y):
        clean = quality(images, targets, peak=255, border=border)
        assert torch.equal(quality(spoilt, targets, peak=255, border=border), clean)
        assert not torch.equal(quality(spoilt, targets, peak=255, border=border - 1), clean)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 with scipy's Gaussian, where its window lies inside the picture."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    return float(np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))))


@pytest.mark.parametrize("noise", [2, 12, 60])
def test_ssim_is_the_definition(noise: float) -> None:
    images, targets = pictures(noise=noise)
    found = ssim_y(images, targets, peak=255, border=3)
    for one, image, target in zip(found, images, targets, strict=True):
        lumas = (luma(side[None].double())[0, 0, 3:-3, 3:-3].numpy() for side in (image, target))
        assert float(one) == pytest.approx(reference_ssim(*lumas), abs=1e-4)


def test_meters_average_over_images_whatever_their_sizes() -> None:
    small, large = pictures(1), pictures(2, 60, 50, noise=30)
    for meter, quality in ((PsnrY(255, 2), psnr_y), (SsimY(255, 2), ssim_y)):
        for images, targets in (small, large):
            meter.update(images, targets)
        values = torch.cat([quality(*pair, peak=255, border=2) for pair in (small, large)])
        assert float(meter.compute()) == pytest.approx(float(values.double().mean()))
        meter.reset()
        meter.update(*small)
        assert float(meter.compute()) == pytest.approx(float(values[0]))


def test_what_cannot_be_compared_is_refused() -> None:
    a = torch.rand(1, 3, 20, 20)
    for other in (torch.rand(1, 3, 20, 21), torch.rand(3, 20, 20), torch.rand(2, 3, 20, 20)):
        with pytest.raises(DataError, match=r"\[1, 3, 20, 20\] cannot be compared with"):
            psnr_y(a, other, peak=1, border=2)
    with pytest.raises(DataError, match="cannot be compared"):
        psnr_y(a[:, :1], a[:, :1], peak=1, border=2)
    with pytest.raises(DataError, match=r"20x20 pixels are too small .* border of 10: 21 a side"):
        psnr_y(a, a, peak=1, border=10)
    with pytest.raises(DataError, match="border of 5: 21 a side"):
        ssim_y(a, a, peak=1, border=5)
