"""Decisions against scipy: probabilities, entropy, margins, and the statistics of sampling."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dqss.decision import Decision, OneHot, Sampled, Softmax, StraightThroughGumbel, draw_all
from dqss.supernet import Supernet
from tests.support.nets import small_space

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8)


def decision(logits: list[float], name: str = "d") -> Decision:
    made = Decision(name, list(range(len(logits))))
    with torch.no_grad():
        made.logits.copy_(torch.tensor(logits))
    return made


@given(logit_lists, st.floats(0.05, 5))
def test_softmax_entropy_margin_are_scipys(logits: list[float], temperature: float) -> None:
    made = decision(logits)
    p = scipy.special.softmax(np.array(logits, dtype=np.float64))
    np.testing.assert_allclose(made.probabilities(), p, rtol=1e-12)
    assert made.entropy().item() == pytest.approx(scipy.stats.entropy(p), rel=1e-5, abs=1e-6)
    ordered = np.sort(p)[::-1]
    wanted = ordered[0] - ordered[1] if len(p) > 1 else 1.0
    assert made.margin() == pytest.approx(wanted, abs=1e-12)
    made.relaxation = Softmax(temperature)
    cooled = scipy.special.softmax(np.array(logits, dtype=np.float64) / temperature)
    np.testing.assert_allclose(made.weights().detach(), cooled, rtol=3e-4, atol=1e-7)
    assert made.choice == int(np.argmax(logits))


@given(logit_lists)
def test_entropy_has_the_right_gradient(logits: list[float]) -> None:
    made = decision(logits)
    made.entropy().backward()
    p = scipy.special.softmax(np.array(logits, dtype=np.float64))
    # dH/dl_k = -p_k (log p_k + H), where p_k log p_k is 0 at p_k = 0
    wanted = -(scipy.special.xlogy(p, p) + p * scipy.stats.entropy(p))
    np.testing.assert_allclose(made.logits.grad, wanted, atol=1e-5)


def test_ties_go_to_the_first_option_and_assignment_beats_logits() -> None:
    made = decision([1.0, 3.0, 3.0])
    assert made.choice == 1
    made.assigned = 0
    assert made.choice == 0
    made.assigned = None
    assert made.choice == 1


def test_no_options_is_refused() -> None:
    with pytest.raises(ValueError, match="'empty' has no options"):
        Decision("empty", [])


def noise_of(*path: str, seed: int, step: int) -> dict[str, torch.Tensor]:
    supernet = Supernet(nn.ModuleDict({name: nn.Linear(3, 3) for name in path}), small_space())
    supernet.draw(seed, step)
    return {name: d.noise.clone() for name, d in supernet.decisions.items()}


def test_noise_depends_on_seed_step_and_name_only() -> None:
    first = noise_of("a", "b", seed=3, step=7)
    torch.manual_seed(99)
    torch.rand(1)
    again = noise_of("b", "c", "a", seed=3, step=7)  # other network, order, global state
    for name in first:
        assert torch.equal(first[name], again[name])
    drawn = [
        *again.values(),
        *noise_of("a", seed=3, step=8).values(),
        *noise_of("a", seed=4, step=7).values(),
    ]
    assert len({tuple(noise.tolist()) for noise in drawn}) == len(drawn)


def test_noise_is_standard_gumbel() -> None:
    made = Decision("wide", range(20_000))
    made.draw(torch.Generator().manual_seed(0))
    assert torch.isfinite(made.noise).all()
    assert scipy.stats.kstest(made.noise.numpy(), scipy.stats.gumbel_r.cdf).pvalue > 0.01


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1.5, -0.5, 0.3, 0.0]])
def test_samples_at_temperature_one_follow_softmax(logits: list[float]) -> None:
    made = decision(logits)
    made.relaxation = StraightThroughGumbel(1.0)
    generator = torch.Generator().manual_seed(5)
    draws = 4000
    counts = np.zeros(len(logits))
    for _ in range(draws):
        made.draw(generator)
        counts += made.weights().detach().numpy()
    assert counts.sum() == draws  # each sample is exactly one-hot
    expected = draws * scipy.special.softmax(np.array(logits))
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01


@given(logit_lists, st.floats(0.1, 3), st.integers(0, 2**31))
def test_straight_through_value_is_hard_and_gradient_soft(
    logits: list[float], temperature: float, seed: int
) -> None:
    made = decision(logits)
    made.relaxation = StraightThroughGumbel(temperature)
    made.draw(torch.Generator().manual_seed(seed))
    weights = made.weights()
    assert sorted(weights.tolist()) == [0.0] * (len(logits) - 1) + [1.0]
    g = torch.randn(len(logits), generator=torch.Generator().manual_seed(seed))
    weights.backward(g)
    z = (np.array(logits, dtype=np.float64) + made.noise.double().numpy()) / temperature
    p = scipy.special.softmax(z)
    jacobian = (np.diag(p) - np.outer(p, p)) / temperature
    np.testing.assert_allclose(made.logits.grad, jacobian @ g.double().numpy(), atol=2e-4)


@pytest.mark.parametrize("choice", [0, 2])
def test_one_hot_passes_the_gradient_of_the_weights(choice: int) -> None:
    made = decision([0.3, 5.0, -1.0])
    made.relaxation = OneHot(choice)
    weights = made.weights()
    assert weights.tolist() == [float(k == choice) for k in range(3)]
    g = torch.randn(3)
    weights.backward(g)
    assert torch.equal(made.logits.grad, g)


@given(logit_lists, st.integers(0, 2**31))
def test_the_place_is_where_all_the_weight_is(logits: list[float], seed: int) -> None:
    made = decision(logits)
    made.draw(torch.Generator().manual_seed(seed))
    for relaxation in (StraightThroughGumbel(0.6), OneHot(len(logits) - 1), Sampled()):
        made.relaxation = relaxation
        place = made.place()
        assert place is not None and made.weights().tolist() == [
            float(k == place) for k in range(len(logits))
        ]
    made.relaxation = Softmax()
    assert made.place() is None


def test_a_sample_follows_softmax_and_passes_the_gradient_of_the_weights() -> None:
    made = decision([1.5, -0.5, 0.3, 0.0])
    made.relaxation = Sampled()
    generator = torch.Generator().manual_seed(3)
    counts = np.zeros(4)
    for _ in range(4000):
        made.draw(generator)
        counts[made.place()] += 1
    expected = 4000 * np.array(made.probabilities())
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01
    g = torch.randn(4)
    made.weights().backward(g)
    assert torch.equal(made.logits.grad, g)


def test_weights_are_fp32_under_autocast() -> None:
    made = decision([0.3, 5.0, -1.0])
    for relaxation in (Softmax(0.3), StraightThroughGumbel(), OneHot(1)):
        made.relaxation = relaxation
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made.weights().dtype == made.entropy().dtype == torch.float32


def test_logits_and_noise_stay_fp32_when_the_network_is_halved() -> None:
    made = decision([0.1, 0.2, 1 / 3])
    before = made.logits.detach().clone()
    nn.Sequential(made).to(torch.bfloat16).half()
    assert made.logits.dtype == made.noise.dtype == torch.float32
    assert torch.equal(made.logits.detach(), before)


@given(st.lists(logit_lists, min_size=1, max_size=5), st.integers(0, 2**31))
def test_many_drawn_at_once_are_those_drawn_alone(rows: list[list[float]], seed: int) -> None:
    many, alone = ([decision(row, str(n)) for n, row in enumerate(rows)] for _ in range(2))
    for made in (*many, *alone):
        made.relaxation = Sampled()
    draw_all(many, [torch.Generator().manual_seed(seed + n) for n in range(len(rows))])
    for n, made in enumerate(alone):
        made.draw(torch.Generator().manual_seed(seed + n))
    for one, other in zip(many, alone, strict=True):
        assert torch.equal(one.noise, other.noise)
        assert one.place() == other.place() == int((one.logits + one.noise).argmax())


def test_where_a_sample_falls_follows_logits_noise_and_relaxation() -> None:
    made = decision([0.0, 0.0, 0.0])
    made.relaxation = Sampled()
    made.draw(torch.Generator().manual_seed(0))
    for k in (2, 0, 1):
        with torch.no_grad():
            made.logits.zero_()[k] = 99.0
        assert made.place() == k and made.weights().tolist() == [float(k == j) for j in range(3)]
    with torch.no_grad():
        made.noise.copy_(torch.tensor([0.0, 0.0, 999.0]))
    assert made.place() == 2
    made.relaxation = OneHot(0)
    assert made.place() == 0
    made.relaxation = Softmax()
    assert made.place() is None
