"""Patches depend on seed and index alone, and keep pictures and low resolution together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dqss.data.paired_images import PairedImages
from dqss.data.pairs import Pair
from dqss.data.patches import Patches, transformed
from dqss.errors import DataError
from tests.support.pictures import write_picture


@pytest.fixture
def images(tmp_path: Path) -> PairedImages:
    """Five pairs; a picture's pixels are those of its low-resolution version, four times each way."""
    pairs = []
    for number in range(5):
        low = write_picture(tmp_path / "LR" / f"{number}.png", 9 + number, 12, seed=number)
        pixels = np.asarray(Image.open(low)).repeat(4, axis=0).repeat(4, axis=1)
        high = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(high)
        pairs.append(Pair(high, low))
    return PairedImages(pairs, 4)


def test_a_patch_is_a_function_of_seed_and_index(images: PairedImages) -> None:
    forward = [Patches(images, 5, 40, seed=3)[index] for index in range(40)]
    torch.manual_seed(1)
    patches = Patches(images, 5, 40, seed=3)
    for index in reversed(range(40)):
        for found, expected in zip(patches[index], forward[index], strict=True):
            assert torch.equal(found, expected)
    loaded = DataLoader(patches, batch_size=40, num_workers=2)
    assert torch.equal(next(iter(loaded))[0], torch.stack([low for low, _ in forward]))
    other = Patches(images, 5, 40, seed=4)
    assert sum(torch.equal(other[index][0], forward[index][0]) for index in range(40)) < 10


@pytest.mark.parametrize("augment", [False, True])
def test_low_resolution_and_picture_show_the_same(images: PairedImages, augment: bool) -> None:
    patches = Patches(images, 5, 60, augment=augment)
    for index in range(60):
        low, high = patches[index]
        assert low.shape == (3, 5, 5) and low.dtype == high.dtype == torch.uint8
        assert torch.equal(high, low.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_every_picture_comes_once_a_round_in_changing_order(images: PairedImages) -> None:
    patches = Patches(images, 5, 100)
    rounds = [[patches.picture(5 * number + place) for place in range(5)] for number in range(20)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 10


def test_places_and_symmetries_are_all_drawn(images: PairedImages) -> None:
    one = PairedImages(images.pairs[:1], 4)
    low, _ = one[0].whole()
    places = {
        (top, left, symmetry): transformed(low[:, top : top + 8, left : left + 8], symmetry)
        for top in range(2)
        for left in range(5)
        for symmetry in range(8)
    }
    by_pixels = {patch.numpy().tobytes(): place for place, patch in places.items()}
    assert len(by_pixels) == 80
    patches = Patches(one, 8, 1000)
    drawn = [by_pixels[patches[index][0].numpy().tobytes()] for index in range(1000)]
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    # 80 cells of 12.5 expected: chi-square of 79 degrees, 99.9 % below 124.8
    assert len(counts) == 80 and ((counts - 12.5) ** 2 / 12.5).sum() < 124.8
    upright = Patches(one, 8, 1000, augment=False)
    assert {by_pixels[upright[index][0].numpy().tobytes()][2] for index in range(100)} == {0}


def test_symmetries_are_the_eight_of_the_square() -> None:
    image = torch.arange(9).view(1, 3, 3)
    views = {tuple(transformed(image, symmetry).flatten().tolist()) for symmetry in range(8)}
    turns = [np.rot90(np.arange(9).reshape(3, 3), turn) for turn in range(4)]
    assert views == {tuple(view.flatten()) for turn in turns for view in (turn, turn[:, ::-1])}
    assert torch.equal(transformed(image, 0), image)


def test_pictures_smaller_than_a_patch_are_refused(images: PairedImages) -> None:
    with pytest.raises(DataError, match=r"\d\.png is \d+x12 pixels when shrunk: too small for patches of 13"):
        Patches(images, 13, 1)[0]
    with pytest.raises(DataError, match="no pictures"):
        Patches(PairedImages([], 4), 5, 1)
