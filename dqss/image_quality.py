"""How good an enlarged picture is, as the super-resolution literature measures it.

Pictures are rounded to eight bits, a border as wide as the scale is cut off, and luma alone
(ITU-R BT.601 in studio range, 16..235, not rounded) is compared, against a peak of 255.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dqss.errors import DataError
from dqss.losses import LUMA

_BLACK = 16.0  # of luma in studio range
_PEAK = 255.0
# The window of SSIM: a Gaussian of this deviation, cut where torchmetrics cuts it.
_SIGMA, _WINDOW = 1.5, 11


def to_pixels(images: Tensor, peak: float) -> Tensor:
    """Images of range ``0..peak``, clipped and rounded to whole numbers in 0..255, as float64."""
    return (images.detach().double() * (_PEAK / peak)).clamp(0, _PEAK).round()


def luma(pixels: Tensor) -> Tensor:
    """``[N, 1, H, W]`` in 16..235 from colours ``[N, 3, H, W]`` in 0..255."""
    weights = torch.tensor(LUMA, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    return _BLACK + (pixels * weights).sum(dim=1, keepdim=True) / _PEAK


def psnr_y(images: Tensor, targets: Tensor, *, peak: float, border: int) -> Tensor:
    """Peak signal-to-noise ratio of the luma, in dB, one an image: ``[N]``; infinite for equal ones.

    Args:
        images: ``[N, 3, H, W]`` in ``0..peak``; what lies outside is clipped.
        targets: likewise.
        peak: value of white.
        border: pixels cut off at each side; the scale of the network.

    Raises:
        DataError: if the two differ in size, or nothing is left of them.
    """
    images, targets = _comparable(images, targets, peak, border, least=1)
    ratio: Tensor = peak_signal_noise_ratio(
        images, targets, data_range=_PEAK, reduction="none", dim=(1, 2, 3)
    )
    return ratio.reshape(len(images))


def ssim_y(images: Tensor, targets: Tensor, *, peak: float, border: int) -> Tensor:
    """Structural similarity of the luma (Wang et al. 2004), one an image: ``[N]``, at most 1.

    The window is a Gaussian of 11x11 pixels with deviation 1.5; places where it leaves the image
    do not count.

    Args:
        images, targets, peak, border: see :func:`psnr_y`.

    Raises:
        DataError: if the two differ in size, or the window does not fit into what is left.
    """
    images, targets = _comparable(images, targets, peak, border, least=_WINDOW)
    # Convolutions in double precision are ten times slower on the CPU, and change less than 1e-4.
    places: Any = structural_similarity_index_measure(
        images.float(),
        targets.float(),
        data_range=_PEAK,
        sigma=_SIGMA,
        kernel_size=_WINDOW,
        reduction="none",
        return_full_image=True,
    )[1]
    # torchmetrics mirrors the image at its edges, and counts what comes of that.
    outside = _WINDOW // 2
    inside: Tensor = places[..., outside:-outside, outside:-outside]
    return inside.mean(dim=(1, 2, 3))


class _MeanOverImages(Metric):
    """The mean of a quality over all images seen: the field's number for a test set.

    Args:
        peak: value of white.
        border: pixels cut off at each side.
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, peak: float, border: int) -> None:
        super().__init__()
        self.peak, self.border = peak, border
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def quality(self, images: Tensor, targets: Tensor) -> Tensor:
        """``[N]`` from two ``[N, 3, H, W]``."""
        raise NotImplementedError

    def update(self, images: Tensor, targets: Tensor) -> None:
        """Count a batch ``[N, 3, H, W]`` of outputs and what they should be."""
        values = self.quality(images, targets)
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean; not a number before any image."""
        return self.total / self.count


class PsnrY(_MeanOverImages):
    """Mean over images of :func:`psnr_y`, in dB."""

    def quality(self, images: Tensor, targets: Tensor) -> Tensor:
        """See :func:`psnr_y`."""
        return psnr_y(images, targets, peak=self.peak, border=self.border)


class SsimY(_MeanOverImages):
    """Mean over images of :func:`ssim_y`."""

    def quality(self, images: Tensor, targets: Tensor) -> Tensor:
        """See :func:`ssim_y`."""
        return ssim_y(images, targets, peak=self.peak, border=self.border)


def _comparable(
    images: Tensor, targets: Tensor, peak: float, border: int, least: int
) -> tuple[Tensor, Tensor]:
    """The two lumas without the border."""
    if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"pictures of {list(images.shape)} cannot be compared with {list(targets.shape)}: "
            "expected two of [N, 3, H, W]"
        )
    height, width = images.shape[2:]
    if min(height, width) - 2 * border < least:
        raise DataError(
            f"pictures of {height}x{width} pixels are too small to be compared without a border of "
            f"{border}: {least + 2 * border} a side are needed"
        )
    inside = (..., slice(border, height - border), slice(border, width - border))
    return luma(to_pixels(images, peak)[inside]), luma(to_pixels(targets, peak)[inside])
