"""Reads the re-compressed CIFAR images of the study data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def load_jpeg_npz(path: str | Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` uint8 of a file of JPEGs, and their labels ``[N]``.

    Files are sorted by class, so ``count`` images are taken evenly spread.
    """
    with np.load(path, allow_pickle=False) as archive:
        stream, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    total = len(labels)
    count = total if count is None else min(count, total)
    chosen = [position * total // count for position in range(count)]
    images = [
        np.asarray(Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels[chosen].astype(np.int64))
