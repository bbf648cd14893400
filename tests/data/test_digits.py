"""The embedded data, and the shipped weights measured on it."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dqss.data.digits import Digits
from dqss.errors import DataError
from dqss.models.factory import DIGITS_INPUT, digits_resnet20
from dqss.models.loaded import InputConfig


def keys(pixels: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in pixels]


def test_parts_are_disjoint_stratified_and_complete() -> None:
    train, validation = Digits().parts
    everything = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
    assert sorted(keys(train.images) + keys(validation.images)) == sorted(keys(everything))
    assert len(validation) >= 500
    share = len(validation) / len(everything)
    for digit in range(10):
        of_class = int((load_digits().target == digit).sum())
        assert abs(int(validation.labels.eq(digit).sum()) - share * of_class) <= 1


def test_calibration_is_normalized_training_images_with_their_labels() -> None:
    data = Digits(calibration_images=100)
    data.configure(DIGITS_INPUT)
    samples = data.calibration()
    indices = range(100)
    pixels = samples.batch(indices) * DIGITS_INPUT.std[0] + DIGITS_INPUT.mean[0]
    assert len(samples) == 100 and samples.uniform
    train = data.parts[0]
    known = dict(zip(keys(train.images), train.labels.tolist(), strict=True))
    targets = samples.targets(indices)
    restored = (pixels * 16).round().to(torch.uint8)
    assert targets is not None
    assert [known[key] for key in keys(restored)] == targets.tolist()
    assert targets.bincount().tolist() == pytest.approx([10] * 10, abs=1)


def test_choice_depends_on_the_seed_alone() -> None:
    def chosen(seed: int) -> torch.Tensor:
        return Digits(calibration_images=64, seed=seed).calibration().batch(range(64))

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))


def test_training_statistics_are_those_of_the_input_configuration() -> None:
    train = Digits().parts[0]
    pixels = train.pixels(range(len(train)))
    assert DIGITS_INPUT.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-3)
    assert DIGITS_INPUT.std[0] == pytest.approx(float(pixels.std()), abs=1e-3)


def test_images_follow_the_network() -> None:
    data = Digits(calibration_images=3)
    data.configure(InputConfig(size=(3, 32, 32)))
    batch = data.calibration().batch([0, 1, 2])
    assert batch.shape == (3, 3, 32, 32)
    data.configure(InputConfig(size=(2, 8, 8), mean=(0.5, 0.5), std=(0.5, 0.5)))
    assert data.calibration().batch([0]).shape == (1, 2, 8, 8)


def test_augmentation_shifts_by_at_most_one_pixel() -> None:
    data = Digits()
    image = torch.zeros(200, 1, 8, 8)
    image[:, :, 4, 4] = 1.0
    shifted = data.augment(image)
    places = {tuple(place[2:]) for place in shifted.nonzero().tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert torch.equal(shifted.sum(dim=(1, 2, 3)), torch.ones(200))


@torch.no_grad()
def test_shipped_weights_have_the_stated_accuracy_and_quantization_hurts_them() -> None:
    loaded, data = digits_resnet20(), Digits()
    data.configure(loaded.input, loaded.num_classes)
    loader = data.val_dataloader()
    assert loader is not None
    batches = list(loader)

    def accuracy(model: torch.nn.Module) -> float:
        correct = [model(inputs).argmax(dim=1).eq(targets).numpy() for inputs, targets in batches]
        return float(np.concatenate(correct).mean())

    assert accuracy(loaded.module) >= 0.98
    rough = copy.deepcopy(loaded.module)
    for layer in rough.modules():
        if isinstance(layer, torch.nn.Conv2d):
            step = layer.weight.abs().amax(dim=(1, 2, 3), keepdim=True)
            layer.weight.copy_((layer.weight / step).round() * step)
    assert accuracy(rough) < accuracy(loaded.module) - 0.08


@pytest.mark.parametrize("value", [0, -3])
def test_numbers_below_one_are_refused(value: int) -> None:
    with pytest.raises(DataError, match=f"data.calibration_images={value}"):
        Digits(calibration_images=value)
    with pytest.raises(DataError, match=f"data.batch_size={value}"):
        Digits(batch_size=value)


def test_more_images_than_there_are_uses_all(caplog: pytest.LogCaptureFixture) -> None:
    samples = Digits(calibration_images=5000).calibration()
    assert len(samples) == 1198 and "there are 1198, all are used" in caplog.text
    assert len(set(keys(samples.batch(range(1198))))) == len(set(keys(Digits().parts[0].images)))
