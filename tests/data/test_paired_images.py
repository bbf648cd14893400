"""Pictures of all kinds become pixels, or are refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dqss.data.bicubic import shrink
from dqss.data.paired_images import PairedImages, read_pixels
from dqss.data.pairs import Pair
from dqss.errors import DataError
from tests.support.pictures import write_picture, write_png16


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_pictures_of_any_mode_become_colour(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("L", (6, 4), 255).convert(mode).save(tmp_path / f"a{suffix}")
    pixels = read_pixels(tmp_path / f"a{suffix}")
    assert pixels.shape == (3, 4, 6) and pixels.dtype == torch.uint8 and pixels.min() >= 250


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path, channels: int) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16, 1).repeat(channels, axis=2)
    pixels = read_pixels(write_png16(tmp_path / "deep.png", levels * 257))
    expected = torch.from_numpy(levels.astype(np.uint8)).permute(2, 0, 1).expand(3, -1, -1)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_pictures_are_refused_and_opaque_ones_are_not(tmp_path: Path, channels: int) -> None:
    values = np.full((4, 4, channels), 65535, dtype=np.uint16)
    assert read_pixels(write_png16(tmp_path / "a.png", values)).min() == 255
    values[2, 1, -1] = 40000
    with pytest.raises(DataError, match=r"a\.png cannot be used: .*transparent pixels: lay it over"):
        read_pixels(write_png16(tmp_path / "a.png", values))


def test_transparent_palettes_are_refused(tmp_path: Path) -> None:
    Image.new("P", (4, 4), 0).save(tmp_path / "a.png", transparency=0)
    with pytest.raises(DataError, match="transparent pixels"):
        read_pixels(tmp_path / "a.png")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 64, 64)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.png cannot be used: "):
        PairedImages([Pair(path)], 2)[0]


def test_pairs_are_read_as_they_are(tmp_path: Path) -> None:
    pair = Pair(write_picture(tmp_path / "h.png", 12, 20), write_picture(tmp_path / "l.png", 3, 5, seed=1))
    low, high = PairedImages([pair], 4)[0].whole()
    assert torch.equal(low, read_pixels(tmp_path / "l.png"))
    assert torch.equal(high, read_pixels(tmp_path / "h.png"))


def test_odd_sizes_are_cut_to_a_multiple(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "h.png", 15, 22)
    pixels = read_pixels(path)
    alone = PairedImages([Pair(path)], 4)[0]
    assert alone.size == (3, 5)
    low, high = alone.whole()
    assert torch.equal(low, shrink(pixels, 4)) and torch.equal(high, pixels[:, :12, :20])
    paired = Pair(path, write_picture(tmp_path / "l.png", 3, 5))
    assert torch.equal(PairedImages([paired], 4)[0].whole()[1], high)


@pytest.mark.parametrize("size", [(3, 6), (4, 5), (6, 10)])
def test_sizes_that_do_not_belong_together_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    pair = Pair(write_picture(tmp_path / "h.png", 12, 20), write_picture(tmp_path / "l.png", *size))
    with pytest.raises(DataError, match=rf"l\.png is {size[0]}x{size[1]} .* 12x20: at x4, 3x5 were expected"):
        PairedImages([pair], 4)[0]


def test_pictures_smaller_than_the_scale_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png is 3x9 pixels: too small for x4"):
        PairedImages([Pair(write_picture(tmp_path / "a.png", 3, 9))], 4)[0]


@pytest.mark.parametrize("paired", [False, True])
def test_windows_are_cut_from_the_whole(tmp_path: Path, paired: bool) -> None:
    high = write_picture(tmp_path / "h.png", 51, 69)
    pair = Pair(high, write_picture(tmp_path / "l.png", 17, 23) if paired else None)
    opened = PairedImages([pair], 3)[0]
    low, picture = opened.whole()
    for top, left in ((0, 0), (1, 2), (5, 7), (10, 15)):
        window = opened.window(top, left, 7, 8)
        assert torch.equal(window[0], low[:, top : top + 7, left : left + 8])
        assert torch.equal(window[1], picture[:, 3 * top : 3 * top + 21, 3 * left : 3 * left + 24])


def test_decoded_pictures_are_kept_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [Pair(write_picture(tmp_path / f"{name}.png", 8, 8)) for name in "abc"]
    reads: list[str] = []

    def counted(path: Path) -> torch.Tensor:
        reads.append(path.stem)
        return read_pixels(path)

    monkeypatch.setattr("dqss.data.paired_images.read_pixels", counted)
    images = PairedImages(pairs, 2, cache_bytes=2 * 3 * 8 * 8)
    for _ in range(2):
        for index in range(3):
            images[index].whole()
    assert reads == ["a", "b", "c", "c"]
