"""The search step by step: which samples it sees, what moves, and by how much."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dqss.calls import call_model
from dqss.decision import Softmax
from dqss.errors import NonFiniteError
from dqss.lit.ptq import StepBatches
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, SoftmaxSchedule
from dqss.measure import Evaluator
from tests.support.searches import PARTS, fit, search


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, batch_size: int, seed: int, epoch: int) -> None:
    part = [3 * index + 1 for index in range(size)]
    plan = StepBatches(part, batch_size, steps=10**6, seed=seed)
    per_epoch = size // plan.batch_size
    seen = [index for step in range(per_epoch) for index in plan.at(epoch * per_epoch + step)]
    assert len(seen) == per_epoch * plan.batch_size > size - plan.batch_size  # less than a batch is left out
    assert len(set(seen)) == len(seen) and set(seen) <= set(part)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.integers(0, 40), st.integers(0, 40))
def test_batches_go_on_from_any_step(size: int, batch: int, seed: int, steps: int, start: int) -> None:
    whole = list(StepBatches(range(size), batch, steps, seed))
    assert list(StepBatches(range(size), batch, steps, seed, start)) == whole[start:]
    assert len(whole) == steps


def test_epochs_and_seeds_differ_in_order() -> None:
    plans = [StepBatches(range(32), 32, 4, seed) for seed in (0, 1, 2)]
    orders = {tuple(batch) for plan in plans for batch in plan}
    assert len(orders) == 12
    assert list(plans[0]) == list(StepBatches(range(32), 32, 4, 0))


def loss_by_hand(evaluator: Evaluator, step: int) -> torch.Tensor:
    indices = StepBatches(PARTS["search"], 4, 9, seed=7).at(step)
    inputs = evaluator.samples.batch(indices)
    with torch.no_grad():
        wanted = call_model(evaluator.supernet, inputs)
    with evaluator.supernet.mode("relaxed"):
        found = call_model(evaluator.supernet, inputs)
    kl = torch.nn.functional.kl_div
    return kl(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")


def test_first_step_is_adams_on_the_kl_of_its_batch() -> None:
    module = search(SoftmaxSchedule(), learning_rate=0.25)
    supernet = module.supernet
    loss = loss_by_hand(module.evaluator, 0)
    gradients = torch.autograd.grad(loss, supernet.arch_parameters())
    fit(module)
    for logits, gradient in zip(supernet.arch_parameters(), gradients, strict=True):
        # From rest, Adam's first step is lr * g / (|g| + eps), whatever its betas.
        torch.testing.assert_close(logits.detach(), -0.25 * gradient / (gradient.abs() + 1e-8))
    (row,) = module.history
    assert row["soft_loss"] == pytest.approx(float(loss.detach()), rel=1e-5) and row["step"] == 0


class Pressed(SoftmaxSchedule):
    """Entropy has its weight from the first step on."""

    def entropy_weight(self, progress: float) -> float:
        return 2.5


def test_entropy_penalty_enters_with_its_weight() -> None:
    module = search(SoftmaxSchedule(entropy=5.0, entropy_delay=0.0), steps=2)
    supernet = module.supernet
    for k, decision in enumerate(supernet.decisions.values()):
        decision.logits.data[0] = 0.3 + 0.1 * k
    loss = loss_by_hand(module.evaluator, 0)
    total = module.training_step(StepBatches(PARTS["search"], 4, 2, seed=7).at(0), 0)
    torch.testing.assert_close(total, loss)  # progress 0: not yet
    module.schedule = Pressed()
    total = module.training_step(StepBatches(PARTS["search"], 4, 2, seed=7).at(0), 0)
    entropies = [
        torch.distributions.Categorical(logits=d.logits).entropy() for d in supernet.decisions.values()
    ]
    torch.testing.assert_close(total, loss + 2.5 * torch.stack(entropies).mean())


def test_only_logits_move_and_dropout_sleeps() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(64, 3))
    module = search(GumbelSchedule(), steps=3, model=nn.Sequential(*layers))
    names = {name for name, _ in module.named_parameters() if name.endswith("decision.logits")}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()  # as some versions of Lightning do
    fit(module)
    assert not any(part.training for part in module.supernet.model)
    assert len(names) == len(module.supernet.arch_parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) != (name in names), name


def test_each_fall_of_the_entropy_leaves_an_argmax() -> None:
    """... also where the search is interrupted between two of them."""
    schedule = MeanFieldSchedule(reheats=2, reheat_steps=1)
    module = fit(search(schedule, steps=8))
    module.settle()
    assert schedule.cold(8) == [6, 7, 8] and len(module.found) == 3
    assert module.found[-1] == module.supernet.argmax()
    for steps, count in ((3, 1), (6, 1), (7, 2)):
        short = search(schedule, steps=8)
        short.batches.steps = steps
        short.schedule = Fixed(schedule.cold(8))
        fit(short)
        kept: dict[str, Any] = {}
        short.on_save_checkpoint(kept)
        other = search(schedule, steps=8)
        other.on_load_checkpoint(kept)
        other.settle()
        assert len(other.found) == count, steps


class Fixed(MeanFieldSchedule):
    """Cold after given steps, whatever the length of the search."""

    def __init__(self, cold: list[int]) -> None:
        super().__init__()
        object.__setattr__(self, "_cold", cold)

    def cold(self, steps: int) -> list[int]:
        return list(vars(self)["_cold"])


def test_history_and_cost_of_a_search() -> None:
    module = fit(search(SoftmaxSchedule(), steps=5, discrete_every=2, discrete_images=2))
    assert [row["step"] for row in module.history] == list(range(5))
    assert ["discrete_distance" in row for row in module.history] == [True, False, True, False, True]
    # 5 steps of 4 images at 3; 3 measurements of 2 images; references once each: all 8, and 2
    assert module.evaluator.meter.evaluations == 5 * 4 * 3 + 3 * 2 + 8 + 2
    last = module.history[-1]
    margins = []
    for decision in module.supernet.decisions.values():
        p = torch.softmax(decision.logits.detach(), 0)
        margins.append(abs(float(p[0] - p[1])))
    assert 0 < last["margin_min"] <= last["margin_mean"] <= max(margins) + 0.1
    silent = fit(search(SoftmaxSchedule(), steps=3, discrete_every=0))
    assert not any("discrete_distance" in row for row in silent.history)


def test_measuring_on_the_way_changes_nothing() -> None:
    """... nor does it leave a mode, a choice or a random state behind."""
    often = fit(search(GumbelSchedule(), steps=4, discrete_every=1))
    never = fit(search(GumbelSchedule(), steps=4, discrete_every=0))
    for a, b in zip(often.supernet.arch_parameters(), never.supernet.arch_parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["soft_loss"] for row in often.history] == [row["soft_loss"] for row in never.history]


def test_a_checkpoint_holds_what_learns_and_nothing_of_the_network() -> None:
    module = fit(search(SoftmaxSchedule(), steps=2))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {f"logits.{name}" for name in module.supernet.decisions}
    fresh = search(SoftmaxSchedule(), steps=2)
    fresh.on_load_checkpoint(checkpoint)
    for a, b in zip(module.supernet.arch_parameters(), fresh.supernet.arch_parameters(), strict=True):
        assert torch.equal(a, b)
    assert fresh.history == module.history
    assert fresh.evaluator.meter.evaluations == module.evaluator.meter.evaluations


def test_a_loss_that_is_no_number_stops_the_search() -> None:
    module = search(SoftmaxSchedule())
    module.loss = lambda output, reference, targets: output.sum() * float("nan")
    with pytest.raises(NonFiniteError, match=r"nan at step 0; with Adam, lower method\.learning_rate"):
        fit(module)


def test_relaxation_follows_the_schedule() -> None:
    module = fit(search(SoftmaxSchedule(temperature=2.0, final_temperature=0.5), steps=3))
    for decision in module.supernet.decisions.values():
        assert decision.relaxation == Softmax(0.5)
