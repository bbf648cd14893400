"""The contrastive loss of RLFN (arXiv 2205.07514): near the picture, and away from what blurs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS = 64
# In the denominator, where an output is the negative itself.
_LEAST = 1e-7


class ContrastiveLoss(nn.Module):
    """How far an output's features are from the picture's, as a share of how far from the negative's.

    The features are those of a fixed random extractor of two layers (3x3 convolution, tanh, 3x3
    convolution), which sees small details where a trained one would see objects. Both distances are L1.
    The paper does not say how many channels there are, nor how they are drawn: these are ours.

    Args:
        peak: value of white in the pictures.
        channels: of both layers.
        seed: of the extractor.
    """

    def __init__(self, peak: float, channels: int = _CHANNELS, seed: int = 0) -> None:
        super().__init__()
        self.peak = peak
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.extract = nn.Sequential(layers[0], nn.Tanh(), layers[1]).requires_grad_(False)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """A scalar; 0 where ``anchor`` is ``positive``.

        Args:
            anchor: output ``[N, 3, H, W]`` in ``0..peak``.
            positive: the picture that it should be.
            negative: what it should not be: the input, enlarged by interpolation.
        """
        found, wanted, unwanted = (self.features(images) for images in (anchor, positive, negative))
        return F.l1_loss(found, wanted) / F.l1_loss(found, unwanted).clamp(min=_LEAST)

    def features(self, images: Tensor) -> Tensor:
        """``[N, channels, H, W]`` of pictures in ``0..peak``, normalized to -1..1."""
        features: Tensor = self.extract(2.0 * images / self.peak - 1.0)
        return features
