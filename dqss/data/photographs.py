"""Photographs that come with scikit-image and scikit-learn: nothing to download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dqss.data.pairs import Pair
from dqss.data.super_resolution import SuperResolutionData
from dqss.errors import DataError

_SKIMAGE, _SKLEARN = "skimage", "sklearn"
_PLACES = {_SKIMAGE: ("skimage", "data"), _SKLEARN: ("sklearn", "datasets", "images")}
# What numbers were measured on must not move: the lists are fixed, whatever a version adds. Drawings,
# test charts and pictures through microscopes are left out; the two sides of the stereo pair show the
# same thing and are both on one side.
_TRAINING = (
    (_SKIMAGE, "astronaut.png"),
    (_SKIMAGE, "brick.png"),
    (_SKIMAGE, "camera.png"),
    (_SKLEARN, "china.jpg"),
    (_SKIMAGE, "grass.png"),
    (_SKIMAGE, "gravel.png"),
    (_SKIMAGE, "motorcycle_left.png"),
    (_SKIMAGE, "motorcycle_right.png"),
    (_SKIMAGE, "rocket.jpg"),
)
_VALIDATION = ((_SKIMAGE, "chelsea.png"), (_SKIMAGE, "coffee.png"), (_SKLEARN, "flower.jpg"))


class Photographs(SuperResolutionData):
    """Nine photographs to search or train on, three others to measure on; low resolution is made on the fly.

    Args:
        calibration_images: how many patches to search on.
        patch: pixels a side of a low-resolution patch; None for what the network was trained on.
        seed: of the choice of patches.

    Raises:
        DataError: for numbers below one; when they are read, if a package or a picture is missing.
    """

    def __init__(self, calibration_images: int = 32, patch: int | None = None, seed: int = 0) -> None:
        super().__init__(calibration_images, patch, seed)

    def training_pairs(self) -> list[Pair]:
        """See :class:`Photographs`."""
        return [Pair(_file(*place)) for place in _TRAINING]

    def validation_pairs(self) -> list[Pair] | None:
        """See :class:`Photographs`."""
        return [Pair(_file(*place)) for place in _VALIDATION]


def _file(package: str, name: str) -> Path:
    """A picture inside an installed package."""
    top, *folders = _PLACES[package]
    shown = {_SKIMAGE: "scikit-image", _SKLEARN: "scikit-learn"}[package]
    try:
        path = Path(str(files(top).joinpath(*folders, name)))
    except ModuleNotFoundError:
        raise DataError(f"data=photographs needs {shown}: pip install {shown}") from None
    if not path.is_file():
        raise DataError(
            f"data=photographs: the installed {shown} has no {name}: pip install --upgrade {shown}"
        )
    return path
