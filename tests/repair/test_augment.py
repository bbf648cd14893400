"""Transformed copies of inputs: what they are, that repair learns from just these, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqss
from dqss.bundle import Bundle
from dqss.errors import UserError
from dqss.progress import Reporter
from dqss.randomness import generator_for
from dqss.repair import RepairSettings, repair_strategy
from dqss.repair.augment import AREA, ASPECT, Augmentation, blends, crop, flip
from dqss.repair.cache import Store
from dqss.repair.keeping import Kept
from dqss.repair.repair import _Work
from dqss.repair.units import find_units
from tests.repair.support import pictures, settings


def mirrored(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Of one's own, without chance."""
    return inputs.flip(-1)


def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def test_each_image_is_mirrored_or_not() -> None:
    images = torch.rand(40, 2, 3, 5)
    found = flip(images, generator_for(0, "a"))
    turned = [torch.equal(one, image.flip(-1)) for one, image in zip(found, images, strict=True)]
    left = [torch.equal(one, image) for one, image in zip(found, images, strict=True)]
    assert all(a != b for a, b in zip(turned, left, strict=True)) and 8 < sum(turned) < 32


def test_a_crop_is_a_part_at_full_size() -> None:
    """Of an image whose pixels say where they are: between them, so do those of the part, as a line."""
    height, width, count = 40, 60, 200
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    image = torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1)])
    found = crop(image.expand(count, -1, -1, -1), generator_for(0, "a"))
    assert found.shape == (count, 2, height, width)
    shares, ratios = [], []
    for part in found.double():
        sizes = []
        for line, size in ((part[0, :, 0], height), (part[1, 0], width)):
            middle = line[size // 4 : 3 * size // 4]
            step = float(middle[-1] - middle[0]) / (len(middle) - 1)
            kept, first = step * size, float(middle[0]) - (size // 4 + 0.5) * step + 0.5
            assert kept == pytest.approx(round(kept), abs=1e-3)
            assert first == pytest.approx(round(first), abs=1e-3)
            assert first > -1e-3 and first + kept < size + 1e-3
            assert torch.allclose(middle.diff(), torch.full_like(middle[1:], step), atol=1e-4)
            sizes.append(kept / size)
        shares.append(sizes[0] * sizes[1])
        ratios.append(sizes[0] / sizes[1])
    assert AREA[0] - 0.02 < min(shares) < 0.45 and 0.9 < max(shares) <= 1
    assert 1 / ASPECT - 0.05 < min(ratios) < 0.85 and 1.15 < max(ratios) < ASPECT + 0.05
    assert torch.equal(found, crop(image.expand(count, -1, -1, -1), generator_for(0, "a")))


def test_units_see_inputs_copies_of_them_and_those_held_out(model: nn.Module, bundle: Bundle) -> None:
    images = pictures(48)
    options = settings(blocks=(), augment=[noisy], augment_copies=2, held_out=0.125)
    work = _Work(model, bundle, dqss.Samples.of(images), options, None, 3, Reporter(), None, False)
    (first, *_), _ = find_units(work.exact, list(work._weights()), (), images[:2])
    data = work.feed(Store(2**30)).data(first)
    learned = images[:42]
    copies = [
        torch.cat(
            [noisy(learned[at : at + 32], generator_for(3, "augmented", copy, at)) for at in range(0, 42, 32)]
        )
        for copy in range(2)
    ]
    assert data.learned == 3 * 42
    assert torch.equal(data.quantized, torch.cat([learned, *copies, images[42:]]))
    with torch.no_grad():
        wanted = torch.relu(
            nn.functional.conv2d(data.quantized, model.stem.weight, model.stem.bias, padding=1)
        )
    assert torch.allclose(data.wanted, wanted, atol=1e-5)


def test_copies_are_like_so_many_inputs_more(model: nn.Module, bundle: Bundle) -> None:
    """To the bit: what is learned from inputs with copies is what is learned from both, given as inputs."""
    images = pictures(32)
    both = torch.cat([images, images.flip(-1)])
    for blocks in ((), ("auto",)):
        plain = settings(blocks=blocks, held_out=0.0)
        augmented = settings(blocks=blocks, held_out=0.0, augment=mirrored, augment_copies=1)
        one = repair_strategy(model, bundle, both, plain).bundle.tensors
        other = repair_strategy(model, bundle, images, augmented).bundle.tensors
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    without = repair_strategy(model, bundle, images, settings(blocks=blocks, held_out=0.0)).bundle.tensors
    assert any(not torch.equal(without[key], other[key]) for key in other)


class Stopped(Exception):
    pass


def test_interrupted_it_ends_in_the_same_bits(
    model: nn.Module, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(blocks=(), augment=["flip", "crop", "blend", noisy], network_iterations=30)
    whole = repair_strategy(model, bundle, pictures(), options)
    keep, got = Kept.put, Kept.get

    def stop(self: Any, position: int, *arguments: Any) -> None:
        keep(self, position, *arguments)
        if position == 2:
            raise Stopped

    known: list[bool] = []

    def get(self: Any, *arguments: Any) -> Any:
        found = got(self, *arguments)
        known.append(found is not None)
        return found

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Kept, "put", stop)
        repair_strategy(model, bundle, pictures(), options, folder=tmp_path)
    monkeypatch.setattr(Kept, "get", get)
    again = repair_strategy(model, bundle, pictures(), options, folder=tmp_path)
    assert known == [True] * 3 + [False] * (len(known) - 3) and len(known) > 3
    assert all(torch.equal(value, whole.bundle.tensors[key]) for key, value in again.bundle.tensors.items())
    assert again.errors == whole.errors and again.network == whole.network
    for others in ({"augment": ["flip", "crop", "blend"]}, {"augment_copies": 1}, {"augment": []}):
        known.clear()
        other = settings(blocks=(), **{"augment": options.augment, "network_iterations": 0, **others})
        repair_strategy(model, bundle, pictures(), other, folder=tmp_path / "copy")
        assert not any(known)


def test_the_whole_network_learns_from_what_is_transformed(model: nn.Module, bundle: Bundle) -> None:
    seen: list[Tensor] = []

    def noted(inputs: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(noisy(inputs, generator))
        return seen[-1]

    options = RepairSettings(iterations=0, network_iterations=5, batch_size=16, augment=noted)
    found = repair_strategy(model, bundle, pictures(48), options)
    assert found.network is not None
    # Once to see whether it suits, judged before and after seven times, and in each iteration.
    learning = [batch for batch in seen if len(batch) == 16]
    assert len(learning) == 5 and sum(len(batch) == 6 for batch in seen) == 14
    assert len({float(batch.sum()) for batch in learning}) == 5
    blended = repair_strategy(
        model, bundle, pictures(48), RepairSettings(iterations=0, network_iterations=5, batch_size=16)
    )
    named = RepairSettings(iterations=0, network_iterations=5, batch_size=16, augment="blend")
    same = repair_strategy(model, bundle, pictures(48), named).bundle.tensors
    assert all(torch.equal(value, same[key]) for key, value in blended.bundle.tensors.items())


def test_the_record_names_the_transformations(model: nn.Module, bundle: Bundle) -> None:
    found = repair_strategy(model, bundle, pictures(), settings(iterations=2, augment=["flip", mirrored]))
    record: Any = found.bundle.strategy.repair
    assert json.loads(json.dumps(record))["settings"]["augment"] == ["flip", f"{__name__}.mirrored"]


def test_unknown_names() -> None:
    with pytest.raises(
        UserError, match=r"repair.augment: 'turn' is unknown: choose some of flip, crop, blend"
    ):
        RepairSettings(augment=["flip", "turn"])
    with pytest.raises(UserError, match=r"repair.augment_copies=-1"):
        RepairSettings(augment_copies=-1)


@pytest.mark.parametrize("name", ["flip", "crop"])
@pytest.mark.parametrize("inputs", [torch.rand(4, 7), torch.zeros(4, 3, 8, 8, dtype=torch.int64)])
def test_what_is_for_images_is_refused_for_others(name: str, inputs: Tensor) -> None:
    with pytest.raises(UserError, match=rf"repair.augment: {name} is for images .*{inputs.shape[1]}"):
        Augmentation([name]).check(inputs)


def test_what_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"repair.augment: blend is for real numbers, not for int64 \[4, 3\]"):
        Augmentation(["blend"]).check(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"repair.augment: .*half made float32 \[2, 3\] of float32 \[4, 3\]"):
        Augmentation([half]).check(torch.zeros(4, 3))
    for step in (flip, crop, blends):
        Augmentation([step]).check({"a": torch.rand(2, 3, 8, 8), "flag": True})


def half(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs[:2]
