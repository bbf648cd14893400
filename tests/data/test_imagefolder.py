"""Folders of images: which are taken, what they are labelled, and what happens to broken ones."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from dqss.data.image_files import image_files, read_image, spread
from dqss.data.image_items import ImageItems
from dqss.data.imagefolder import ImageFolder
from dqss.data.labels import labels_of
from dqss.errors import DataError
from dqss.lit.training_data import TrainingData, seeded
from dqss.models.factory import timm_model
from dqss.models.loaded import InputConfig

SMALL = InputConfig(size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


def write(path: Path, value: int, mode: str = "RGB", size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).convert(mode).save(path)
    return path


def folder(root: Path, names: list[str], each: int = 2) -> Path:
    for position, name in enumerate(names):
        for number in range(each):
            write(root / name / f"{number}.png", 10 * position)
    return root


def small(root: Path, **options: object) -> ImageFolder:
    data = ImageFolder(root, root, **options)  # type: ignore[arg-type]
    data.configure(SMALL)
    return data


def values(batch: Tensor) -> list[int]:
    """The grey value of each constant image."""
    return (batch.mean(dim=(1, 2, 3)) * 255).round().int().tolist()


def labels(root: Path, classes: int | None) -> tuple[list[int] | None, str]:
    found = labels_of(image_files(root, "x"), root, classes)
    return found.labels, found.reason


def test_integer_folders_are_class_indices(tmp_path: Path) -> None:
    folder(tmp_path, ["0007", "12", "3"])
    assert labels(tmp_path, 1000) == ([7, 7, 12, 12, 3, 3], "")
    found, reason = labels(tmp_path, 12)
    assert found is None and "12 is beyond the model's 12 classes" in reason


def test_wordnet_folders_are_looked_up(tmp_path: Path) -> None:
    folder(tmp_path, ["n01440764", "n02123045", "n15075141"], each=1)
    found, _ = labels(tmp_path, 1000)
    assert found == [0, 281, 999]
    assert [ImageNetInfo().index_to_label_name(index) for index in found] == [
        "n01440764",
        "n02123045",
        "n15075141",
    ]
    assert labels(tmp_path, None)[0] == found
    assert labels(tmp_path, 3)[0] == [0, 1, 2]
    assert labels(tmp_path, 17)[0] is None
    write(tmp_path / "n99999999" / "a.png", 0)
    found, reason = labels(tmp_path, 1000)
    assert found is None and "n99999999" in reason


def test_named_folders_count_in_sorted_order_if_they_are_all_classes(tmp_path: Path) -> None:
    folder(tmp_path, ["dog", "cat", "emu"], each=1)
    assert labels(tmp_path, 3)[0] == labels(tmp_path, None)[0] == [0, 1, 2]
    found, reason = labels(tmp_path, 10)
    assert found is None and "3 class folders, but the model has 10" in reason


def test_flat_and_mixed_folders_are_unlabelled(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 0)
    assert "1 of 1" in labels(tmp_path, 1)[1]
    write(tmp_path / "0" / "a.png", 0)
    found, reason = labels(tmp_path, 1)
    assert found is None and "1 of 2" in reason


def test_validation_batches_carry_labels_in_order(tmp_path: Path) -> None:
    data = small(folder(tmp_path, ["0", "1", "2"]), batch_size=4)
    loader = data.val_dataloader()
    assert loader is not None and len(loader) == 2
    batches = list(loader)
    assert [len(inputs) for inputs, _ in batches] == [4, 2]
    for inputs, targets in batches:
        assert values(inputs) == [10 * int(target) for target in targets]


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    folder(tmp_path, [str(index) for index in range(5)])
    alone, shared = (
        list(small(tmp_path, batch_size=3, num_workers=workers).val_dataloader() or ()) for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 4
    for (inputs, targets), (others, other_targets) in zip(alone, shared, strict=True):
        assert torch.equal(inputs, others) and torch.equal(targets, other_targets)


def test_unlabelled_validation_is_announced_and_has_no_targets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.jpg", 40)
    data = small(tmp_path)
    assert [targets for _, targets in data.val_dataloader() or ()] == [None]
    assert "without labels" in caplog.text and "1 unlabelled validation" in data.summary()
    assert data.calibration().targets([0]) is None


def test_transforms_are_those_of_the_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    loaded = timm_model("tf_efficientnet_lite0")
    data = ImageFolder(tmp_path)
    data.configure(loaded.input, loaded.num_classes)
    image = Image.open(tmp_path / "a.png")
    resized = image.resize((round(400 * 256 / 300), 256), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, 16
    cut = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    expected = torch.from_numpy((cut / 255 - 0.5) / 0.5).permute(2, 0, 1)
    found = data.calibration().batch([0])[0]
    assert (found - expected).abs().mean() < 0.01


def broken(root: Path, count: int) -> None:
    for number in range(count):
        (root / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")


def test_corrupt_images_are_named_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "good1.png", 50)
    write(tmp_path / "good2.png", 60)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    (tmp_path / "whole.png").unlink()
    (tmp_path / "empty.jpg").touch()
    broken(tmp_path, 6)
    samples = small(tmp_path).calibration()
    assert sorted(values(samples.batch([0, 1]))) == [50, 60] and len(samples) == 2
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in lines if line.startswith("skipped ")]) == 5
    assert lines[-1].endswith("skipped 8 unreadable images in all")
    assert any("broken0.jpg" in line for line in lines) and not any("\n" in line for line in lines)


def test_a_batch_without_a_readable_image_is_left_out(tmp_path: Path) -> None:
    folder(tmp_path, ["0", "1", "2"], each=2)
    for number in range(2):
        (tmp_path / "1" / f"{number}.png").write_bytes(b"no")
    (tmp_path / "2" / "0.png").write_bytes(b"no")
    batches = list(small(tmp_path, batch_size=2).val_dataloader() or ())
    assert [(values(inputs), targets.tolist()) for inputs, targets in batches] == [
        ([0, 0], [0, 0]),
        ([20], [2]),
    ]


def test_all_corrupt_is_an_error(tmp_path: Path) -> None:
    broken(tmp_path, 3)
    data = small(tmp_path)
    with pytest.raises(DataError, match="none of 3 images is readable"):
        data.calibration()
    with pytest.raises(DataError, match="none of 3 images is readable"):
        list(data.val_dataloader() or ())


def test_folders_that_are_missing_empty_or_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.calibration_dir is not given"):
        ImageFolder()
    with pytest.raises(DataError, match="absent does not exist"):
        small(tmp_path / "absent").calibration()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    with pytest.raises(DataError, match=r"data\.validation_dir=.* has no images"):
        small(tmp_path).val_dataloader()
    with pytest.raises(DataError, match="is not a folder"):
        small(tmp_path / "notes.txt").calibration()


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, ["0", "1"])

    def denied(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        small(tmp_path).calibration()


@pytest.mark.parametrize("option", ["calibration_images", "validation_images", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(DataError, match=f"data.{option}={value}"):
        small(tmp_path, **{option: value})


def test_more_images_than_there_are_uses_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, ["0", "1"])
    assert len(small(tmp_path, calibration_images=50).calibration()) == 4
    assert "has 4, all are used" in caplog.text


@pytest.mark.parametrize(("count", "chosen"), [(1, 1), (10, 3), (256, 256), (1000, 256), (997, 996), (5, 9)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_choice_is_evenly_spread(count: int, chosen: int, seed: int) -> None:
    indices = spread(count, chosen, seed)
    assert len(indices) == min(count, chosen) == len(set(indices))
    assert indices == sorted(indices) == spread(count, chosen, seed)
    assert indices[0] >= 0 and indices[-1] < count
    gaps = np.diff([*indices, indices[0] + count])
    assert gaps.max() - gaps.min() <= 1


def test_seeds_choose_other_images() -> None:
    assert len({tuple(spread(1000, 10, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", ".png"),
        ("RGBA", ".png"),
        ("LA", ".png"),
        ("P", ".gif"),
        ("CMYK", ".jpg"),
        ("RGB", ".webp"),
        ("1", ".png"),
    ],
)
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", 255, mode)
    image = read_image(path, "RGB")
    assert image.mode == "RGB" and np.asarray(image).min() >= 250


@pytest.mark.parametrize(("dtype", "top", "suffix"), [(np.uint16, 65535, ".png"), (np.float32, 1.0, ".tif")])
def test_deep_images_are_scaled_not_clipped(tmp_path: Path, dtype: type, top: float, suffix: str) -> None:
    ramp = np.linspace(0, top, 256).reshape(16, 16).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / f"deep{suffix}")
    found = np.asarray(read_image(tmp_path / f"deep{suffix}", "RGB"))[..., 1]
    assert np.abs(found.astype(int).ravel() - np.arange(256)).max() <= 1


def test_decompression_bombs_are_refused_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "big.png", 0, size=60)
    for limit in (2000, 1000):  # Pillow warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="DecompressionBomb"):
            read_image(path, "RGB")


def test_postscript_is_not_handed_to_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("an outside program was started")

    monkeypatch.setattr("subprocess.Popen", run)
    monkeypatch.setattr("subprocess.check_call", run)
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        read_image(tmp_path / "a.png", "RGB")


def test_models_with_one_channel_get_grey_and_others_are_refused(tmp_path: Path) -> None:
    data = ImageFolder(write(tmp_path / "a.png", 128).parent)
    data.configure(InputConfig(size=(1, 8, 8), mean=(0.0,), std=(1.0,)))
    assert data.calibration().batch([0]).shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match="4 channels"):
        data.configure(InputConfig(size=(4, 8, 8)))


def test_training_images_are_labelled_augmented_and_drawn_from_the_global_generators(tmp_path: Path) -> None:
    folder(tmp_path, ["0", "1", "2"])
    data = small(tmp_path, train_dir=tmp_path)
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(picture).save(tmp_path / "2" / "0.png")
    training = TrainingData.of(data.train_dataloader())
    with seeded(0, 1):
        first, targets = training.batch([0, 2, 4])
    with seeded(0, 1):
        again, _ = training.batch([0, 2, 4])
    with seeded(0, 2):
        other, _ = training.batch([0, 2, 4])
    assert targets is not None and targets.tolist() == [0, 1, 2] and first.shape == (3, 3, 8, 8)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_unreadable_training_image_is_replaced_by_the_next(tmp_path: Path, caplog) -> None:
    folder(tmp_path, ["0", "1"])
    for name in ("0/1.png", "1/1.png"):
        (tmp_path / name).write_bytes(b"nothing")
    items = small(tmp_path, train_dir=tmp_path).train_dataloader().dataset
    assert [items[k][1] for k in range(4)] == [0, 1, 1, 0]
    assert "1.png" in caplog.text and "takes its place" in caplog.text
    for file in items.files:
        file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of 4 images"):
        ImageItems(items.files, items.labels, "RGB", items.transform)[0]


def test_unlabelled_training_images_have_no_targets(tmp_path: Path, caplog) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.png", 50)
    training = TrainingData.of(small(tmp_path, train_dir=tmp_path).train_dataloader())
    assert training.batch([0, 1])[1] is None
    assert "without labels" in caplog.text


def test_no_training_folder_is_said(tmp_path: Path) -> None:
    folder(tmp_path, ["0"])
    with pytest.raises(DataError, match=r"data\.train_dir is not given"):
        small(tmp_path).train_dataloader()
    with pytest.raises(DataError, match=r"data\.train_dir=.*does not exist"):
        small(tmp_path, train_dir=tmp_path / "absent").train_dataloader()
