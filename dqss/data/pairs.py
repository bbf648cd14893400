"""Pictures and their low-resolution versions: where folders have them.

Known layouts, for a scale of 4:

* ``FOLDER/HR`` and ``FOLDER/LR`` (or both below ``FOLDER/x4``), files of the same names;
* DIV2K and Flickr2K as published: ``FOLDER/DIV2K_train_HR`` beside
  ``FOLDER/DIV2K_train_LR_bicubic/X4``, where ``0001.png`` becomes ``0001x4.png``; either ``FOLDER``
  or the folder that ends in ``_HR`` may be named;
* pictures alone, as in ``BSDS500/data/images/train``: low-resolution versions are made on the fly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqss.data.image_files import check_folder, image_files
from dqss.errors import DataError


@dataclass(frozen=True)
class Pair:
    """A picture, and its low-resolution version where there is a file of it."""

    high: Path
    low: Path | None = None


def find_pairs(folder: Path, scale: int, option: str) -> list[Pair]:
    """The pictures of a folder in one of the known layouts, sorted.

    Args:
        folder: where to look.
        scale: factor between the sides of picture and low-resolution version.
        option: the option that named the folder, for messages.

    Raises:
        DataError: if the folder is missing or has no pictures, if it has several sets of them, or
            if pictures and low-resolution versions are not the same ones.
    """
    check_folder(folder, option)
    high, low = _sides(folder, scale, option)
    pictures = _directly_in(high, option)
    if low is None:
        return [Pair(picture) for picture in pictures]
    return _matched(pictures, _directly_in(low, option), low, scale, option)


def _sides(folder: Path, scale: int, option: str) -> tuple[Path, Path | None]:
    """The folders of pictures and of low-resolution versions."""
    for root in (folder, folder / f"x{scale}", folder / f"X{scale}"):
        if (root / "HR").is_dir():
            low = root / "LR"
            return root / "HR", low if low.is_dir() else None
    published = sorted(path for path in folder.glob("*_HR") if path.is_dir())
    if folder.name.endswith("_HR"):
        published = [folder]
    if len(published) > 1:
        raise DataError(f"{option}={folder} has {_names(published)}: name one of them")
    if published:
        versions = published[0].parent / f"{published[0].name.removesuffix('_HR')}_LR_bicubic"
        low = versions / f"X{scale}"
        return published[0], low if low.is_dir() else None
    others = sorted(path for path in folder.glob("[xX]?") if (path / "HR").is_dir())
    if others:
        raise DataError(
            f"{option}={folder} has {_names(others)}, and not x{scale}: give {others[0] / 'HR'} to have its "
            "pictures shrunk on the fly"
        )
    return folder, None


def _directly_in(folder: Path, option: str) -> list[Path]:
    """The pictures in a folder; those further below belong to other sets, or are other things."""
    every = image_files(folder, option)
    direct = [path for path in every if path.parent == folder]
    if not direct:
        places = sorted({path.parent for path in every})
        raise DataError(f"{option}={folder} has pictures only in folders below ({_names(places)}): name one")
    return direct


def _matched(
    pictures: Sequence[Path], versions: Sequence[Path], folder: Path, scale: int, option: str
) -> list[Pair]:
    """Each picture with the file of its name, or its name and the scale, as published."""
    known = {path.stem: path for path in versions}
    pairs = []
    for picture in pictures:
        low = known.pop(picture.stem, None) or known.pop(f"{picture.stem}x{scale}", None)
        if low is None:
            raise DataError(f"{option}: {picture} has no low-resolution version in {folder}")
        pairs.append(Pair(picture, low))
    if known:
        raise DataError(f"{option}: {next(iter(known.values()))} has no picture in {pictures[0].parent}")
    return pairs


def _names(paths: Sequence[Path], count: int = 4) -> str:
    return ", ".join(map(str, paths[:count])) + (", ..." if len(paths) > count else "")
