"""The study of exports: its control and its strategies are what its README says."""

import pytest
import torch

from dqss.apply import apply_strategy
from dqss.deploy.compared import Whole
from dqss.deploy.targets import GENERIC
from dqss.samples import Samples
from experiments.export.control import ROUNDING, compare, rounded_otherwise
from experiments.export.networks import Case
from experiments.export.run import drawn, strategy
from tests.support.nets import cnn, images, output


def case() -> Case:
    torch.manual_seed(0)
    return Case(cnn(), images(8), Samples.of(images(20)), "noise")


def test_a_simulation_is_at_no_distance_from_itself() -> None:
    found = case()
    simulation = apply_strategy(found.model, strategy(found, "W8A8", GENERIC))
    whole = compare(simulation, simulation, found.samples)
    assert (whole.count, whole.relative_error, whole.agreement) == (20, 0.0, 1.0)


def test_the_control_changes_each_output_by_a_rounding() -> None:
    found = case()
    bundle = strategy(found, "W8A8", GENERIC)
    plain, changed = (apply_strategy(found.model, bundle) for _ in range(2))
    rounded_otherwise(changed, ["6"], 0)
    x = images(4)
    ratio = output(changed, x).double() / output(plain, x).double() - 1
    assert 0 < float(ratio.abs().max()) <= 2 * ROUNDING


def test_mixed_strategies_have_many_widths_and_are_the_same_each_time() -> None:
    found = case()
    one, other = (strategy(found, "mixed", GENERIC, seed).strategy for seed in (3, 3))
    assert one.layers == other.layers
    assert len({choice.bits for _, _, choice in one.choices()}) > 2


def test_inputs_are_drawn_at_random_and_the_same_each_time() -> None:
    samples = Samples.of(torch.arange(100.0)[:, None])
    few = drawn(samples, 10)
    picked = [float(few.batch([index])) for index in range(10)]
    assert len(set(picked)) == 10 and picked != sorted(picked)
    assert picked == [float(drawn(samples, 10).batch([index])) for index in range(10)]
    assert drawn(samples, None) is samples


def test_errors_add_up_over_batches() -> None:
    torch.manual_seed(1)
    exact, wanted, found = (torch.randn(9, 5) for _ in range(3))
    whole = Whole()
    for run in (slice(0, 4), slice(4, 9)):
        whole.add(len(exact[run]), exact[run], wanted[run], found[run])
    assert whole.relative_error == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-5)
    assert whole.noise == pytest.approx(float((exact - wanted).norm() / wanted.norm()), rel=1e-5)
    assert whole.largest == pytest.approx(float((found - wanted).abs().max()))
    assert whole.agreement == pytest.approx(float((found.argmax(1) == wanted.argmax(1)).float().mean()))
