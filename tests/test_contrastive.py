"""The contrastive loss of RLFN: where it is 0 and 1, which way it pulls, and that it is fixed."""

import pytest
import torch
from torch import Tensor

from dqss.contrastive import ContrastiveLoss


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    """A picture and something else, in 0..255."""
    generator = torch.Generator().manual_seed(1)
    one, two = (255 * torch.rand(2, 3, 12, 14, generator=generator) for _ in range(2))
    return one, two


def test_it_is_zero_at_the_picture_and_grows_towards_the_negative(pictures: tuple[Tensor, Tensor]) -> None:
    wanted, unwanted = pictures
    loss = ContrastiveLoss(255.0)
    assert loss(wanted, wanted, unwanted) == 0
    course = [float(loss(wanted.lerp(unwanted, share), wanted, unwanted)) for share in (0.1, 0.3, 0.5, 0.8)]
    assert course == sorted(course)
    # The features are not linear, but half way is about as far from both.
    assert course[2] == pytest.approx(1.0, abs=0.1)
    assert torch.isfinite(loss(unwanted, wanted, unwanted))


def test_it_is_the_ratio_of_two_l1_distances_of_features(pictures: tuple[Tensor, Tensor]) -> None:
    (wanted, unwanted), loss = pictures, ContrastiveLoss(255.0, channels=5)
    anchor = wanted.flip(-1)
    weights = [(layer.weight, layer.bias) for layer in (loss.extract[0], loss.extract[2])]

    def features(images: Tensor) -> Tensor:
        scaled = images / 127.5 - 1
        hidden = torch.tanh(torch.conv2d(scaled, *weights[0], padding=1))
        return torch.conv2d(hidden, *weights[1], padding=1)

    near = (features(anchor) - features(wanted)).abs().sum()
    far = (features(anchor) - features(unwanted)).abs().sum()
    torch.testing.assert_close(loss(anchor, wanted, unwanted), near / far)


def test_networks_of_any_range_see_the_same(pictures: tuple[Tensor, Tensor]) -> None:
    wanted, unwanted = pictures
    anchor = wanted.flip(-2)
    expected = ContrastiveLoss(255.0)(anchor, wanted, unwanted)
    found = ContrastiveLoss(1.0)(anchor / 255, wanted / 255, unwanted / 255)
    torch.testing.assert_close(found, expected)


def test_the_extractor_is_fixed_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = ContrastiveLoss(1.0), ContrastiveLoss(1.0), ContrastiveLoss(1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.extract[0].weight, two.extract[0].weight)
    assert not torch.equal(one.extract[0].weight, three.extract[0].weight)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_gradients_reach_the_output_alone(pictures: tuple[Tensor, Tensor]) -> None:
    (wanted, unwanted), loss = pictures, ContrastiveLoss(255.0)
    anchor = wanted.lerp(unwanted, 0.5).requires_grad_()
    loss(anchor, wanted, unwanted).backward()
    assert anchor.grad is not None
    moved = anchor.detach() - 1e3 * anchor.grad
    assert loss(moved, wanted, unwanted) < loss(anchor, wanted, unwanted)
