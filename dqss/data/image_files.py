"""Image files: which there are in a folder, and what is in them, whatever they are."""

from __future__ import annotations

import logging
import os
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dqss.errors import DataError

_log = logging.getLogger(__name__)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
# Decoders that work inside this process; Pillow would hand PostScript to an outside program.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
Image.init()  # registers them all: with a list of formats, Pillow looks for no others


def image_files(folder: Path, option: str) -> list[Path]:
    """The image files in ``folder`` and below, sorted; hidden and other files are left out.

    Args:
        folder: where to look.
        option: the option that named it, for messages.

    Raises:
        DataError: if the folder is missing, unreadable, or has no image in it.
    """
    check_folder(folder, option)
    failures: list[OSError] = []
    found = [
        Path(root) / name
        for root, _, names in os.walk(folder, onerror=failures.append)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
    if failures:
        raise DataError(f"{option}: {failures[0].filename} cannot be read: {failures[0].strerror}")
    if not found:
        raise DataError(f"{option}={folder} has no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def check_folder(folder: Path, option: str) -> None:
    """Refuse what is no folder.

    Args:
        folder: what was named.
        option: the option that named it, for messages.

    Raises:
        DataError: for a file, or nothing.
    """
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{option}={folder} {fault}: give a folder of images")


def given_folders(calibration: str | Path | None, validation: str | Path | None) -> tuple[Path, Path | None]:
    """The folders that a data group was given, with ``~`` written out.

    Raises:
        DataError: if there is none to search on.
    """
    if calibration is None:
        raise DataError("data.calibration_dir is not given: name a folder of images")
    return Path(calibration).expanduser(), None if validation is None else Path(validation).expanduser()


def spread(count: int, chosen: int, seed: int) -> list[int]:
    """``chosen`` of the indices ``0..count-1``, evenly spread; the seed moves where they start.

    Files sorted by class thus give every class its share. Asking for more gives all.
    """
    if chosen >= count:
        return list(range(count))
    start = random.Random(seed).random()
    return [min(count - 1, int((position + start) * count / chosen)) for position in range(chosen)]


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as the file's head says, without decoding it.

    Raises:
        DataError: if the file is no image.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # see read_image
        raise DataError(f"{path} cannot be used: {type(error).__name__}: {error}") from None


def read_image(path: Path, mode: str, *, opaque: bool = False) -> Image.Image:
    """The first frame of an image file, in 8-bit ``mode`` (``"RGB"`` or ``"L"``).

    Grey, palette, alpha, CMYK and deeper images are converted; transparency is dropped.

    Args:
        path: the file.
        mode: of the result.
        opaque: refuse images that are transparent somewhere: what colour is there is anyone's guess.

    Raises:
        ValueError: if the file is not such an image, is cut short, or decodes to absurdly many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                if opaque and _is_transparent(image):
                    raise ValueError("it has transparent pixels: lay it over a background")
                return _eight_bit(image).convert(mode)
    except Exception as error:  # decoders raise whatever they meet: struct.error, SyntaxError, ...
        raise ValueError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def _is_transparent(image: Image.Image) -> bool:
    """Whether a pixel is not opaque, as alpha channels, palettes and colour keys can say."""
    if not image.has_transparency_data:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < 255)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey images scaled to 0..255; Pillow alone would clip them to white."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        values = values * 255 if values.max() <= 1 else values
    elif image.mode != "I" or values.max() > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.nan_to_num(values) + 0.5, 0, 255).astype(np.uint8), "L")


class SkippedImages:
    """Names the images that could not be read: one line each for the first few, then a count."""

    def __init__(self, where: str, lines: int = 5) -> None:
        self.where, self.lines, self.count = where, lines, 0

    def add(self, path: Path, reason: Exception) -> None:
        """Count an image and, while there are few, name it."""
        self.count += 1
        if self.count <= self.lines:
            _log.warning("skipped %s: %s", path, reason)

    def close(self) -> None:
        """Say how many were skipped, if more than were named."""
        if self.count > self.lines:
            _log.warning("%s: skipped %d unreadable images in all", self.where, self.count)
