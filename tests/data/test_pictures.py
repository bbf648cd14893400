"""Folders of pictures as a data group: what a search and a measurement get."""

from pathlib import Path

import pytest
import torch

from dqss.data.bicubic import resize, shrink
from dqss.data.digits import Digits
from dqss.data.imagefolder import ImageFolder
from dqss.data.paired_images import read_pixels
from dqss.data.pictures import Pictures
from dqss.errors import DataError
from dqss.models.loaded import InputConfig
from dqss.models.super_resolution import input_of, super_resolution
from tests.support.pictures import write_picture


def config(scale: int = 2, peak: float = 1.0, size: int = 6) -> InputConfig:
    return InputConfig(size=(3, size, size), mean=(0.0,) * 3, std=(1 / peak,) * 3, scale=scale)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", 25 + number, 31, seed=number)
    return tmp_path


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_inputs_and_targets_are_in_the_range_of_the_network(folder: Path, peak: float) -> None:
    data = Pictures(folder, folder, calibration_images=7)
    data.configure(config(peak=peak))
    samples = data.calibration()
    inputs, targets = samples.batch(range(7)), samples.targets(range(7))
    assert inputs.shape == (7, 3, 6, 6) and targets is not None and targets.shape == (7, 3, 12, 12)
    for batch in (inputs, targets):
        assert batch.dtype == torch.float32 and batch.min() >= 0 and peak / 2 < batch.max() <= peak
    restored = (inputs * (255 / peak)).round()
    torch.testing.assert_close(restored, inputs * (255 / peak), rtol=0, atol=1e-4)


def test_validation_is_whole_pictures_one_by_one(folder: Path) -> None:
    data = Pictures(folder, folder)
    data.configure(config(scale=3, peak=255))
    loader = data.val_dataloader()
    assert loader is not None and len(loader) == len(loader.dataset) == 3
    for number, (images, targets) in enumerate(loader):
        pixels = read_pixels(folder / f"{number}.png")[:, : (25 + number) // 3 * 3, :30]
        assert torch.equal(images, shrink(pixels, 3)[None].float())
        assert torch.equal(targets, pixels[None].float())


def test_choice_depends_on_the_seed_alone(folder: Path) -> None:
    def chosen(seed: int, count: int = 5) -> torch.Tensor:
        data = Pictures(folder, calibration_images=count, seed=seed)
        data.configure(config())
        batch: torch.Tensor = data.calibration().batch(range(5))
        return batch

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))
    assert torch.equal(chosen(0, count=9), chosen(0))


def test_patch_size_is_the_networks_unless_given(folder: Path) -> None:
    data = Pictures(folder, calibration_images=1)
    data.configure(config(size=5))
    assert data.calibration().batch([0]).shape == (1, 3, 5, 5) and "1 patches of 5x5" in data.summary()
    data = Pictures(folder, calibration_images=1, patch=4)
    data.configure(config(size=5))
    assert data.calibration().batch([0]).shape == (1, 3, 4, 4)
    data.configure(input_of(super_resolution("edsr_baseline", 4).module))  # type: ignore[arg-type]
    assert data.calibration().targets([0]).shape == (1, 3, 16, 16)  # type: ignore[union-attr]
    assert "out of 3 pictures, enlarged x4; no pictures to measure on" in data.summary()
    assert data.val_dataloader() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "does not say that it does: choose one such as model=rlfn_x4, or give model.input.scale"),
        (InputConfig(size=(3, 224, 224)), "is for networks that enlarge pictures"),
        (InputConfig(size=(1, 8, 8), mean=(0,), std=(1,), scale=2), "1 channels: data=pictures has 3"),
        (InputConfig(size=(3, 8, 8), scale=2), r"give model.input.mean=\[0,0,0\] and one std"),
    ],
)
def test_networks_that_do_not_fit_are_refused(folder: Path, given: InputConfig | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pictures(folder).configure(given)


def test_other_data_refuse_networks_that_enlarge(folder: Path) -> None:
    for data in (Digits(), ImageFolder(folder)):
        name = type(data).__name__.lower()
        with pytest.raises(DataError, match=f"data={name} is for classifiers.* data=pictures or data=photo"):
            data.configure(config())


def test_options_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.calibration_dir is not given: name a folder of images"):
        Pictures()
    with pytest.raises(DataError, match=r"data\.calibration_images=0"):
        Pictures(folder, calibration_images=0)
    with pytest.raises(DataError, match=r"data\.patch=-4"):
        Pictures(folder, patch=-4)
    data = Pictures(folder / "absent")
    data.configure(config())
    with pytest.raises(DataError, match=r"data\.calibration_dir=.*absent does not exist"):
        data.calibration()


def test_bicubic_has_its_published_figure(shared_data: Path) -> None:
    data = Pictures(shared_data / "sr" / "BSDS_train", shared_data / "sr" / "Set5")
    data.configure(config(scale=4, peak=255))
    meter, loader = data.metric()[1], data.val_dataloader()
    assert meter is not None and loader is not None
    psnr = meter()
    for images, targets in loader:
        psnr.update(resize(images.to(torch.uint8), *targets.shape[2:]), targets)
    assert float(psnr.compute()) == pytest.approx(28.43, abs=0.005)
