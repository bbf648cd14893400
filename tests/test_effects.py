"""Potentials of options: exact where the loss is quadratic, and the logits that follow from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqss.effects import logits_of_entropy, potentials


def quadratic(options: int, seed: int) -> tuple[Tensor, Tensor]:
    """Loss of each option of a random quadratic, and all gradients ``G[j, k]`` by autograd."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(options, 5, generator=generator, dtype=torch.float64)
    slope = torch.randn(5, generator=generator, dtype=torch.float64)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        mixed = weights @ errors
        return slope @ mixed + (root @ mixed).square().sum() / 2

    places = torch.eye(options, dtype=torch.float64)
    losses = torch.stack([loss(place) for place in places])
    gradients = torch.stack([torch.autograd.functional.jacobian(loss, place) for place in places])
    return losses, gradients


def sums_of(gradients: Tensor, counts: Tensor) -> Tensor:
    differences = gradients - gradients.diagonal()[:, None]
    return differences * counts[:, None]


@given(st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_a_quadratic_loss_is_recovered_exactly(options: int, seed: int, data: st.DataObject) -> None:
    losses, gradients = quadratic(options, seed)
    counts = torch.tensor(data.draw(st.lists(st.floats(0.1, 50), min_size=options, max_size=options)))
    counts = counts.double()
    found = potentials(sums_of(gradients, counts)[None], counts[None])[0]
    torch.testing.assert_close(found, losses - losses.mean(), rtol=1e-8, atol=1e-8)


def test_from_one_side_alternatives_are_flattered() -> None:
    """... by half the noise between the two, which the other side takes back."""
    losses, gradients = quadratic(2, seed=3)
    one = potentials(sums_of(gradients, torch.tensor([4.0, 0.0]))[None], torch.tensor([[4.0, 0.0]]))[0]
    true = losses[1] - losses[0]
    assert one[1] - one[0] == pytest.approx(float(gradients[0, 1] - gradients[0, 0]))
    assert one[1] - one[0] < true
    assert 2 * true == pytest.approx(
        float(gradients[0, 1] - gradients[0, 0] + gradients[1, 1] - gradients[1, 0])
    )


def test_pairs_seen_from_both_sides_outweigh_the_others() -> None:
    """Three options of equal loss: the third, never in place, seems better from the two that were."""
    sums = torch.tensor([[[0.0, -1.0, -5.0], [-1.0, 0.0, -5.0], [0.0, 0.0, 0.0]]]) * 10
    found = potentials(sums, torch.tensor([[10.0, 10.0, 0.0]]))[0]
    assert found[0] == pytest.approx(float(found[1])) and found[2] < found[0]
    assert float(found.sum()) == pytest.approx(0.0)


def test_many_decisions_at_once_are_many_alone() -> None:
    parts = [quadratic(4, seed)[1] for seed in range(6)]
    counts = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double()
    sums = torch.stack([sums_of(g, n) for g, n in zip(parts, counts, strict=True)])
    together = potentials(sums, counts)
    for d in range(6):
        torch.testing.assert_close(together[d], potentials(sums[d : d + 1], counts[d : d + 1])[0])


def test_nothing_sampled_says_nothing() -> None:
    assert torch.equal(potentials(torch.zeros(2, 3, 3), torch.zeros(2, 3)), torch.zeros(2, 3).double())
    assert torch.equal(potentials(torch.zeros(1, 1, 1), torch.ones(1, 1)), torch.zeros(1, 1).double())


@given(st.floats(0.01, 0.98), st.floats(1e-12, 1e12), st.integers(0, 10**6))
def test_logits_have_the_entropy_wanted(entropy: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    effects = [scale * torch.randn(d, k, generator=generator).double() for d, k in ((3, 8), (2, 5), (2, 1))]
    logits = logits_of_entropy(effects, entropy)
    shares = [
        torch.distributions.Categorical(logits=rows).entropy() / math.log(rows.shape[1])
        for rows in logits[:2]
    ]
    assert float(torch.cat(shares).mean()) == pytest.approx(entropy, abs=1e-3)
    for v, rows in zip(effects, logits, strict=True):
        torch.testing.assert_close(v.argsort(-1), rows.argsort(-1, descending=True))
    ratios = torch.cat([(v / rows).flatten() for v, rows in zip(effects[:2], logits[:2], strict=True)])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))  # one temperature for all


def test_effects_that_say_nothing_leave_the_choice_open() -> None:
    for effects in ([torch.zeros(2, 3)], [torch.zeros(2, 1), torch.zeros(1, 4)], []):
        assert all(not rows.any() for rows in logits_of_entropy(effects, 0.5))
