"""Class indices from the names of class folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

_WORDNET = re.compile(r"n\d{8}")
_IMAGENET_1K = 1000


@dataclass(frozen=True)
class Labelling:
    """Class indices of files, one for each, or None and the reason why there are none."""

    labels: list[int] | None
    reason: str = ""


def labels_of(files: Sequence[Path], folder: Path, num_classes: int | None) -> Labelling:
    """The class of each file, by the folder directly below ``folder`` that it lies in.

    Integers are class indices; WordNet ids (``n01440764``) are looked up in ImageNet's list; other
    names count in sorted order, if they are as many as the network's classes. Anything else, and
    files outside class folders, leave the set unlabelled.

    Args:
        files: images somewhere below ``folder``.
        folder: the root.
        num_classes: number of logits of the network, or None where that is unknown.
    """
    relative = [file.relative_to(folder).parts for file in files]
    outside = sum(len(parts) == 1 for parts in relative)
    if outside:
        return Labelling(None, f"{outside} of {len(files)} images lie outside class folders")
    index = _index_of(sorted({parts[0] for parts in relative}), num_classes)
    if isinstance(index, str):
        return Labelling(None, index)
    top = max(index, key=lambda name: index[name])
    if num_classes is not None and index[top] >= num_classes:
        return Labelling(None, f"class folder {top} is beyond the model's {num_classes} classes")
    return Labelling([index[parts[0]] for parts in relative])


def _index_of(names: Sequence[str], num_classes: int | None) -> Mapping[str, int] | str:
    """Class indices by folder name, or the reason why there are none."""
    if all(name.isascii() and name.isdigit() for name in names):
        return {name: int(name) for name in names}
    if all(_WORDNET.fullmatch(name) for name in names):
        subset = infer_imagenet_subset({"num_classes": num_classes or _IMAGENET_1K})
        if subset is not None:
            return _index_of_wordnet(names, subset)
    if num_classes is not None and len(names) != num_classes:
        return f"{len(names)} class folders, but the model has {num_classes} classes"
    return {name: position for position, name in enumerate(names)}


def _index_of_wordnet(names: Sequence[str], subset: str) -> Mapping[str, int] | str:
    listed: list[str] = ImageNetInfo(subset).label_names()  # type: ignore[no-untyped-call]
    known = {name: index for index, name in enumerate(listed)}
    strange = [name for name in names if name not in known]
    if strange:
        return f"{strange[0]} is not a class of {subset}"
    return {name: known[name] for name in names}
