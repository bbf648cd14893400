"""Where pictures and their low-resolution versions lie."""

from pathlib import Path

import pytest

from dqss.data.pairs import Pair, find_pairs
from dqss.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(root: Path, pairs: list[Pair]) -> list[tuple[str, str | None]]:
    return [
        (
            pair.high.relative_to(root).as_posix(),
            None if pair.low is None else pair.low.relative_to(root).as_posix(),
        )
        for pair in pairs
    ]


def found(root: Path, scale: int = 4, below: str = ".") -> list[tuple[str, str | None]]:
    return relative(root, find_pairs(root / below, scale, "data.calibration_dir"))


@pytest.mark.parametrize("below", ["", "x4/", "X4/"])
def test_paired_folders(tmp_path: Path, below: str) -> None:
    names = [f"{below}{side}/{name}.png" for side in ("HR", "LR") for name in "ba"]
    touch(tmp_path, *names, f"{below}HR/notes.txt")
    assert found(tmp_path) == [(f"{below}HR/{name}.png", f"{below}LR/{name}.png") for name in "ab"]


def test_a_folder_of_pictures_without_versions(tmp_path: Path) -> None:
    touch(tmp_path, "HR/a.png", "HR/b.jpg")
    assert found(tmp_path) == [("HR/a.png", None), ("HR/b.jpg", None)]
    assert found(tmp_path, below="HR") == [("HR/a.png", None), ("HR/b.jpg", None)]


def test_div2k(tmp_path: Path) -> None:
    touch(tmp_path, "DIV2K_train_HR/0001.png", "DIV2K_train_HR/0002.png")
    touch(tmp_path, *(f"DIV2K_train_LR_bicubic/X{x}/000{n}x{x}.png" for x in (2, 4) for n in (1, 2)))
    for scale in (2, 4):
        low = f"DIV2K_train_LR_bicubic/X{scale}/000{{}}x{scale}.png"
        expected = [(f"DIV2K_train_HR/000{n}.png", low.format(n)) for n in (1, 2)]
        assert found(tmp_path, scale) == expected == found(tmp_path, scale, "DIV2K_train_HR")
    # No files for this scale: they are made on the fly.
    assert found(tmp_path, 3) == [(f"DIV2K_train_HR/000{n}.png", None) for n in (1, 2)]
    touch(tmp_path, "DIV2K_valid_HR/0801.png")
    with pytest.raises(DataError, match=r"DIV2K_train_HR, .*DIV2K_valid_HR: name one of them"):
        found(tmp_path)
    assert found(tmp_path, below="DIV2K_valid_HR") == [("DIV2K_valid_HR/0801.png", None)]


def test_flickr2k(tmp_path: Path) -> None:
    touch(tmp_path, "Flickr2K_HR/000001.png", "Flickr2K_LR_bicubic/X4/000001x4.png")
    assert found(tmp_path) == [("Flickr2K_HR/000001.png", "Flickr2K_LR_bicubic/X4/000001x4.png")]


def test_bsds(tmp_path: Path) -> None:
    touch(tmp_path, *(f"data/images/{part}/{part}.jpg" for part in ("train", "val", "test")))
    touch(tmp_path, "data/images/train/Thumbs.db", "data/groundTruth/train/train.mat")
    assert found(tmp_path, below="data/images/train") == [("data/images/train/train.jpg", None)]
    with pytest.raises(DataError, match=r"only in folders below \(.*/test, .*/train, .*/val\): name one"):
        found(tmp_path)


def test_files_at_hand(shared_data: Path) -> None:
    pairs = find_pairs(shared_data / "sr" / "BSDS_train", 4, "x")
    assert len(pairs) == 50 and not any(pair.low for pair in pairs)
    for test_set, count in (("Set5", 5), ("Set14", 14)):
        pairs = find_pairs(shared_data / "sr" / test_set, 4, "x")
        assert len(pairs) == count
        assert all(pair.low is not None and pair.low.name == pair.high.name for pair in pairs)
    with pytest.raises(DataError, match=r"has .*/x4, and not x2: give .*/x4/HR to have its pictures shrunk"):
        find_pairs(shared_data / "sr" / "Set14", 2, "x")


def test_pictures_and_versions_must_be_the_same_ones(tmp_path: Path) -> None:
    touch(tmp_path, "HR/a.png", "HR/b.png", "LR/a.png", "LR/b.png", "LR/c.png")
    with pytest.raises(DataError, match=r"data\.calibration_dir: .*/LR/c\.png has no picture in .*/HR"):
        found(tmp_path)
    (tmp_path / "LR" / "c.png").unlink()
    (tmp_path / "LR" / "b.png").unlink()
    with pytest.raises(DataError, match=r"/HR/b\.png has no low-resolution version in .*/LR"):
        found(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        found(tmp_path, below="absent")
    with pytest.raises(DataError, match="has no images in it"):
        found(tmp_path)
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="is not a folder"):
        found(tmp_path, below="file")
