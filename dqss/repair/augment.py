"""Other inputs made of those at hand: a few hundred are soon known by heart.

The float network says what is wanted for any input, so a transformation need not keep a label right, only
leave the input one of the kind that the network is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dqss.errors import UserError
from dqss.repair.blending import blend, can_blend

Transformation = Callable[[Any, torch.Generator], Any]
"""Of a batch of inputs (a tree of tensors ``[N, ...]``), with a generator on the CPU: a batch of the same
shapes and types, a function of both and nothing else."""

AREA = (0.35, 1.0)
"""Share of an image that a crop keeps."""
ASPECT = 4 / 3
"""Most that a crop is stretched, either way."""


def flip(inputs: Any, generator: torch.Generator) -> Any:
    """Images ``[N, C, H, W]``, each mirrored left to right or not, with even chances."""
    turned = torch.rand(_size(inputs), generator=generator) < 0.5

    def flipped(images: Tensor) -> Tensor:
        return torch.where(turned.to(images.device).reshape(-1, 1, 1, 1), images.flip(-1), images)

    return tree_map_only(Tensor, flipped, inputs)


def crop(inputs: Any, generator: torch.Generator) -> Any:
    """Images ``[N, C, H, W]``, of each a part at its full size, as classifiers are trained (arXiv 1409.4842).

    The part has a share of the area that is drawn evenly from :data:`AREA`, and is stretched by up to
    :data:`ASPECT`.
    """
    draws = torch.rand(_size(inputs), 4, generator=generator, dtype=torch.float64).tolist()

    def cropped(images: Tensor) -> Tensor:
        parts = zip(images, draws, strict=True)
        return torch.cat([_crop(image.unsqueeze(0), *numbers) for image, numbers in parts])

    return tree_map_only(Tensor, cropped, inputs)


def _crop(image: Tensor, area: float, aspect: float, down: float, right: float) -> Tensor:
    height, width = image.shape[-2:]
    share = AREA[0] + area * (AREA[1] - AREA[0])
    ratio = exp((2 * aspect - 1) * log(ASPECT))
    rows = min(height, max(1, round(height * sqrt(share * ratio))))
    columns = min(width, max(1, round(width * sqrt(share / ratio))))
    top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
    part = image[..., top : top + rows, left : left + columns]
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)


def blends(inputs: Any, generator: torch.Generator) -> Any:
    """Weighted means of two inputs of the batch each; see :func:`dqss.repair.blending.blend`."""
    return blend(inputs, _size(inputs), generator)


TRANSFORMATIONS: dict[str, Transformation] = {"flip": flip, "crop": crop, "blend": blends}
"""By the names that settings use."""
OF_IMAGES = (flip, crop)


@dataclass(frozen=True)
class Augmentation:
    """Transformations one after the other.

    Attributes:
        steps: names of :data:`TRANSFORMATIONS`, or functions of one's own.
    """

    steps: Sequence[str | Transformation]

    def __call__(self, inputs: Any, generator: torch.Generator) -> Any:
        """Another batch of the same shapes."""
        for step in self.steps:
            inputs = _function(step)(inputs, generator)
        return inputs

    def check(self, inputs: Any) -> None:
        """Refuse what does not suit such inputs, with a batch of some.

        Raises:
            UserError: naming the transformation.
        """
        for step in self.steps:
            function, name = _function(step), name_of(step)
            if function in OF_IMAGES and not _images(inputs):
                raise UserError(
                    f"repair.augment: {name} is for images [N, C, H, W] of real numbers, "
                    f"not for {_shapes(inputs)}: leave it out"
                )
            if function is blends and not can_blend(inputs):
                raise UserError(
                    f"repair.augment: {name} is for real numbers, not for {_shapes(inputs)}: leave it out"
                )
            found = function(inputs, torch.Generator().manual_seed(0))
            if _shapes(found) != _shapes(inputs):
                raise UserError(
                    f"repair.augment: {name} made {_shapes(found)} of {_shapes(inputs)}: "
                    "shapes and types have to stay"
                )


def check_steps(steps: Sequence[str | Transformation]) -> None:
    """Refuse names that nothing is known of.

    Raises:
        UserError: naming the first.
    """
    for step in steps:
        if not callable(step) and step not in TRANSFORMATIONS:
            known = ", ".join(TRANSFORMATIONS)
            raise UserError(f"repair.augment: {step!r} is unknown: choose some of {known}, or give functions")


def name_of(step: str | Transformation) -> str:
    """What a transformation is called: the same in every process."""
    if isinstance(step, str):
        return step
    return f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', type(step).__qualname__)}"


def _function(step: str | Transformation) -> Transformation:
    return TRANSFORMATIONS[step] if isinstance(step, str) else step


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _size(inputs: Any) -> int:
    return len(_tensors(inputs)[0])


def _images(inputs: Any) -> bool:
    return all(leaf.ndim == 4 and leaf.is_floating_point() for leaf in _tensors(inputs))


def _shapes(inputs: Any) -> str:
    """For messages, and to compare."""
    return ", ".join(
        f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for leaf in _tensors(inputs)
    )
