"""Resizing against MATLAB's own output, against the formula, and against torch away from the edges."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dqss.data.bicubic import crop_to_multiple, margin, resize, shrink
from dqss.data.paired_images import read_pixels
from dqss.errors import DataError


@pytest.mark.parametrize(("test_set", "scale", "count"), [("Set5", 2, 5), ("Set5", 4, 5), ("Set14", 4, 14)])
def test_matlab_images_come_out_bit_for_bit(shared_data: Path, test_set: str, scale: int, count: int) -> None:
    folder = shared_data / "sr" / test_set / f"x{scale}"
    files = sorted((folder / "HR").glob("*.png"))
    assert len(files) == count
    for file in files:
        assert torch.equal(shrink(read_pixels(file), scale), read_pixels(folder / "LR" / file.name)), file


def kernel(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def by_formula(row: np.ndarray, target: int) -> np.ndarray:
    """One axis, pixel by pixel, over all of a line that is continued far beyond its ends."""
    factor, length = target / len(row), len(row)
    stretch = max(1.0, 1 / factor)
    out = []
    for pixel in range(target):
        centre = (pixel + 0.5) / factor - 0.5
        places = range(-4 * length, 5 * length)
        weights = [kernel((centre - place) / stretch) for place in places]
        values = [row[min(max(place, 0), length - 1)] for place in places]
        out.append(float(np.dot(weights, values) / sum(weights)))
    return np.array(out)


@pytest.mark.parametrize(("length", "target"), [(12, 6), (13, 4), (7, 3), (5, 5), (5, 11), (4, 16), (3, 1)])
def test_each_axis_is_the_formula(length: int, target: int) -> None:
    row = np.random.default_rng(length).normal(size=length)
    image = torch.from_numpy(row)
    expected = torch.from_numpy(by_formula(row, target))
    wide = resize(image.view(1, 1, -1).expand(1, 4, -1), 4, target)
    torch.testing.assert_close(wide, expected.view(1, 1, -1).expand(1, 4, -1))
    tall = resize(image.view(1, -1, 1).expand(1, -1, 4), target, 4)
    torch.testing.assert_close(tall, expected.view(1, -1, 1).expand(1, -1, 4))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_torch_agrees_away_from_the_edges(scale: int) -> None:
    images = torch.rand(2, 3, 12 * scale, 10 * scale, dtype=torch.float64)
    theirs = F.interpolate(images, (12, 10), mode="bicubic", antialias=True)
    ours = resize(images, 12, 10)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2])
    assert not torch.allclose(ours[..., 0, :], theirs[..., 0, :], atol=1e-3)


def test_same_size_is_the_same_image() -> None:
    images = torch.randint(256, (2, 3, 9, 8), dtype=torch.uint8)
    assert torch.equal(resize(images, 9, 8), images)


def test_integers_are_rounded_half_up_and_clipped() -> None:
    # The middle of an edge from 0 to 255 is 127.5.
    edge = torch.tensor([[0, 0, 0, 0, 255, 255, 255, 255]], dtype=torch.uint8)
    enlarged = resize(edge.repeat(3, 1), 3, 16)
    assert enlarged.dtype == torch.uint8 and enlarged.min() == 0 and enlarged.max() == 255
    assert resize(torch.tensor([[0, 1]], dtype=torch.uint8), 1, 1).item() == 1
    overshoot = resize(edge.repeat(3, 1).double(), 3, 16)
    assert overshoot.min() < -5 and overshoot.max() > 260


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_only_the_margin_beside_a_place_matters(scale: int) -> None:
    image = torch.randint(256, (3, 20 * scale, 20 * scale), dtype=torch.uint8)
    whole, edge = shrink(image, scale), margin(scale)
    first, last = 8 - edge, 12 + edge
    part = shrink(image[:, scale * first : scale * last, scale * first : scale * last], scale)
    assert torch.equal(part[:, edge:-edge, edge:-edge], whole[:, 8:12, 8:12])
    assert not torch.equal(part, whole[:, first:last, first:last])


def test_what_the_scale_does_not_divide_is_cut_off() -> None:
    image = torch.rand(3, 11, 14)
    assert torch.equal(crop_to_multiple(image, 4), image[:, :8, :12])
    assert shrink(image, 4).shape == (3, 2, 3)


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(DataError, match=r"\[3, 3\] pixels cannot be made 0x5"):
        resize(torch.rand(1, 3, 3), 0, 5)
    with pytest.raises(DataError, match="cannot be made 0x0"):
        shrink(torch.rand(1, 3, 3), 4)
    with pytest.raises(DataError, match=r"torch\.int64 cannot be resized"):
        resize(torch.ones(1, 3, 3, dtype=torch.int64), 2, 2)
