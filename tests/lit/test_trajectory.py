"""What is kept of a search for people to look at, whether or not it was interrupted."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dqss.decision import Decision
from dqss.lit.mean_field import MeanField
from dqss.lit.schedules import MeanFieldSchedule, SoftmaxSchedule
from dqss.lit.trajectory import POINTS, Trajectory
from tests.support.searches import fit, search


def moved(steps: int, until: int | None = None) -> tuple[Trajectory, list[Decision], list[list[list[float]]]]:
    """Decisions whose logits go their way; their own probabilities after every step."""
    decisions = [Decision("a", range(3)), Decision("b", range(5))]
    decisions[1].recognize([0, 0, 1, 2, 1])
    trajectory, seen = Trajectory(decisions, steps), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(until or steps):
        for decision in decisions:
            with torch.no_grad():
                decision.logits += torch.randn(decision.logits.shape, generator=generator)
        trajectory.observe()
        seen.append([decision.probabilities() for decision in decisions])
    return trajectory, decisions, seen


@pytest.mark.parametrize("steps", [1, 5, POINTS, POINTS + 1, 1200])
def test_probabilities_are_those_of_the_decisions(steps: int) -> None:
    trajectory, _, seen = moved(steps)
    kept, found = trajectory.probabilities()
    assert kept.tolist() == list(range(trajectory.every, steps + 1, trajectory.every))
    assert min(steps, POINTS) / 2 <= len(kept) <= POINTS
    for position, step in enumerate(kept.tolist()):
        for name, wanted in zip("ab", seen[step - 1], strict=True):
            assert found[name][position].tolist() == pytest.approx(wanted, abs=1e-6)


def test_going_on_keeps_what_was_kept_before() -> None:
    whole, decisions, _ = moved(200)
    half, _, _ = moved(200, until=90)
    fresh = Trajectory(decisions, 200)
    fresh.load_state_dict(half.state_dict())
    for _ in range(90, 200):
        fresh.observe()
    (steps, found), (wanted_steps, wanted) = fresh.probabilities(), whole.probabilities()
    assert steps.equal(wanted_steps)
    before = 90 // whole.every
    for name, rows in wanted.items():
        assert torch.equal(found[name][:before], rows[:before])
        assert torch.equal(found[name][-1], rows[-1])


def test_the_file_reads_back(tmp_path: Path) -> None:
    trajectory, _, _ = moved(9)
    trajectory.save(tmp_path / "trajectory.safetensors")
    found = safetensors.torch.load_file(tmp_path / "trajectory.safetensors")
    steps, rows = trajectory.probabilities()
    assert found.pop("steps").equal(steps)
    assert set(found) == {"probabilities.a", "probabilities.b"}
    assert all(torch.equal(found[f"probabilities.{name}"], rows[name]) for name in rows)


def test_a_search_ends_where_its_trajectory_ends() -> None:
    module = fit(search(MeanFieldSchedule(), steps=7))
    module.settle()
    steps, found = module.trajectory.probabilities()
    assert steps.tolist() == list(range(1, 8))
    for name, decision in module.supernet.decisions.items():
        assert found[name][-1].tolist() == pytest.approx(decision.probabilities(), abs=1e-6)


def test_checkpoints_carry_trajectory_and_effects() -> None:
    module = fit(search(MeanFieldSchedule(), steps=7))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, MeanField)
    fresh = search(MeanFieldSchedule(), steps=7)
    fresh.on_load_checkpoint(checkpoint)
    assert fresh.trajectory.probabilities()[0].equal(module.trajectory.probabilities()[0])
    for name, decision in module.supernet.decisions.items():
        # Once more from all that was sampled, one decision by itself.
        wanted = optimizer.effects(decision)[decision.outcome]
        assert torch.allclose(fresh.effects[name], wanted, atol=1e-12)
        assert float(wanted.max() - wanted.min()) > 0


def test_other_schedules_learn_no_effects() -> None:
    module = fit(search(SoftmaxSchedule(), steps=2))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["effects"] == {}
