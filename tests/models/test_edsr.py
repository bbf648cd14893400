"""EDSR-baseline: counts, names of published files, and the shift of colours."""

import pytest
import torch

from dqss.models.edsr import EDSR


@pytest.mark.parametrize(("scale", "count"), [(2, 1_369_859), (3, 1_554_499), (4, 1_517_571)])
def test_parameter_counts_are_the_published_ones(scale: int, count: int) -> None:
    assert sum(p.numel() for p in EDSR(scale).parameters()) == count


def test_names_are_those_of_published_files() -> None:
    shift = [f"{name}.{kind}" for name in ("sub_mean", "add_mean") for kind in ("weight", "bias")]
    layers = ["head.0", "body.2", "tail.0.0", "tail.0.2", "tail.1"]
    layers += [f"body.{block}.body.{part}" for block in (0, 1) for part in (0, 2)]
    expected = shift + [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    assert sorted(EDSR(4, channels=4, blocks=2).state_dict()) == sorted(expected)


@torch.no_grad()
def test_colours_are_shifted_by_the_mean_of_the_training_set_and_back() -> None:
    model = EDSR(2, channels=4, blocks=1).eval()
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1) * 255
    assert torch.equal(model.sub_mean(mean).round(decimals=3), torch.zeros(1, 3, 1, 1))
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(torch.rand(1, 3, 6, 7)), mean.expand(1, 3, 12, 14))


@torch.no_grad()
def test_residual_block_adds_its_input() -> None:
    block = EDSR(2, channels=4, blocks=1).body[0]
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(block(x), x + block.body(x))
    block.body[2].weight.zero_()
    block.body[2].bias.zero_()
    assert torch.equal(block(x), x)
