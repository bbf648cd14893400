"""What a model factory returns: the network, where it came from, and the images that it expects."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dqss.errors import ModelError


@dataclass(frozen=True)
class InputConfig:
    """The images that a network was trained on.

    Attributes:
        size: ``(C, H, W)``.
        mean, std: one value a channel, of pixels in 0..1; normalized is ``(x - mean) / std``.
        interpolation: name of the filter that resizes: ``"bilinear"``, ``"bicubic"``.
        crop_pct: the image is resized to ``H / crop_pct`` before its centre is cut out.
        crop_mode: ``"center"``, or timm's ``"squash"`` and ``"border"``.
        scale: factor by which the network enlarges them; 1 for networks that do not. Where it does,
            ``size`` is that of a training patch, and images of other sizes are welcome ...
        smallest: ... of at least so many pixels a side.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    scale: int = 1
    smallest: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no factor.

        Raises:
            ModelError: for it.
        """
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < 1:
            raise ModelError(f"model.input.scale={self.scale}: expected a whole number of at least 1")


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode, ready to be prepared.

    Attributes:
        module: the network.
        source: the group that it came from: ``"timm"``, ``"torchvision"``, ``"own"``, ``"cifar"``.
        name: its name there.
        input: the images that it expects, or None where that is unknown or not an image.
        num_classes: number of logits, or None where that is unknown or not a classifier.
    """

    module: nn.Module
    source: str
    name: str
    input: InputConfig | None = None
    num_classes: int | None = None
