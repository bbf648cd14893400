"""Effects to second order: exact where the distance is second order, and right about what bits do."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import hessian

from dqss.attach import original_weight
from dqss.curvature import Pass, watching
from dqss.losses import Distance, KLDivergence, MeanAbsoluteError, MeanSquaredError
from dqss.measure import Evaluator
from dqss.mixed import MixedQuantizer
from dqss.sensitivity import Squares
from dqss.supernet import Supernet
from dqss.uniform import widest
from tests.support.nets import calibrated, cnn, evaluator_of, images, small_space


def evaluator(model: nn.Module, inputs: torch.Tensor, distance: Distance, size: int = 1) -> Evaluator:
    supernet = calibrated(model, inputs, space=small_space([2, 3, 4, 8], ["minmax", "mse"]))
    everything = list(range(len(inputs)))
    found = evaluator_of(supernet, inputs, {"refine": everything, "select": [0]}, distance)
    found.batch_size = size
    return found


def measured(of: Evaluator, assignment: dict[str, int]) -> dict[str, torch.Tensor]:
    base = of.measure(assignment, "refine")
    return {
        name: torch.tensor(
            [of.measure({**assignment, name: k}, "refine") - base for k in range(len(d.options))]
        )
        for name, d in of.supernet.decisions.items()
    }


@pytest.mark.parametrize("start", [0, 1, 7])
def test_it_is_exact_for_a_linear_network_with_one_output(start: int) -> None:
    """Its squared error is of second order in each decision, and the square of a sign is one."""
    torch.manual_seed(start)
    of = evaluator(nn.Sequential(nn.Linear(6, 1)), images(20, 6), MeanSquaredError())
    assignment = {name: start for name in of.supernet.decisions}
    before = of.meter.evaluations
    found = of.second_order(assignment, "refine").effects
    assert of.meter.evaluations == before + 5 * 20 + 20  # and the float outputs
    for name, wanted in measured(of, assignment).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7, check_dtype=False)


def test_without_slopes_it_is_the_squared_distance_between_the_two_networks() -> None:
    """Whatever the float network's output is; and its standard error is that of a mean of squares."""
    torch.manual_seed(0)
    inputs = images(20, 6)
    of = evaluator(nn.Sequential(nn.Linear(6, 1)), inputs, MeanSquaredError())
    assignment = {name: 1 for name in of.supernet.decisions}

    def output(changed: dict[str, int]) -> torch.Tensor:
        with torch.no_grad(), of.supernet.assign({**assignment, **changed}):
            found: torch.Tensor = of.supernet(inputs)
        return found

    found = of.second_order(assignment, "refine")
    assert not found.alone
    for name, noise in found.noise.items():
        squares = [(output({name: k}) - output({})).square().flatten() for k in range(len(noise))]
        wanted = torch.stack([each.mean() for each in squares])
        torch.testing.assert_close(noise[1], wanted, rtol=1e-4, atol=1e-7, check_dtype=False)


def test_its_standard_error_is_that_of_a_mean_of_squares() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    squares = Squares()
    for row in rows:
        squares.add({"a": row[:4]}, {"a": Pass((1.0,), float(row[4]))})
    wanted = (rows[:, :4] - rows[:, 4:]).square() / 2
    torch.testing.assert_close(squares.sums["a"] / 80, wanted.mean(0))
    torch.testing.assert_close(squares.error("a", 40), wanted.std(0, correction=0) / 40**0.5)


def test_alone_an_option_costs_what_it_is_off_the_float_tensor_also_the_one_in_place() -> None:
    """Of a linear network with one output: half the second derivative, 2, times the mean squared error."""
    torch.manual_seed(0)
    inputs = images(200, 6)
    of = evaluator(nn.Sequential(nn.Linear(6, 1)), inputs, MeanSquaredError())
    start = widest(of.supernet)
    (layer,) = of.supernet.layers.values()
    assert layer.weight is not None and layer.activation is not None
    original = original_weight(layer.module)
    x, weight = (
        layer.activation[start[layer.activation.decision.name]](inputs),
        layer.weight[start[layer.weight.decision.name]](original),
    )
    (found,) = of.second_order(start, "refine", group=1, alone=True).alone
    for k in range(len(layer.weight.candidates)):
        off = (x @ (layer.weight[k](original) - original).T).square().mean()
        assert float(found[layer.weight.decision.name][k]) == pytest.approx(float(off), rel=0.1)
        off = ((layer.activation[k](inputs) - inputs) @ weight.T).square().mean()
        assert float(found[layer.activation.decision.name][k]) == pytest.approx(float(off), rel=0.25)


@pytest.mark.parametrize(("group", "close"), [(1, 1e-4), (4, 0.3)])
def test_the_mean_curvature_is_the_trace_of_the_gauss_newton_matrix(group: int, close: float) -> None:
    """Of a linear layer with squared error over three outputs it is known: ``2 x'x`` and ``2/3 tr(W'W)``."""
    torch.manual_seed(0)
    inputs = images(64, 6)
    of = evaluator(nn.Sequential(nn.Linear(6, 3)), inputs, MeanSquaredError())
    at = {name: 0 for name in of.supernet.decisions}
    norms: dict[str, float] = {}
    with of.supernet.pinned(at), watching(of.supernet) as curvature:
        for batch in inputs.split(group):
            signs = 2.0 * torch.randint(2, (group, 3)) - 1
            of.supernet(batch).backward((2 / 3) ** 0.5 * signs)
            for name, seen in curvature.take().items():
                norms[name] = norms.get(name, 0.0) + sum(seen.norms) / len(inputs)
        costs = curvature.costs({name: [norm] for name, norm in norms.items()})
    (layer,) = of.supernet.layers.values()
    assert layer.weight is not None and layer.activation is not None
    x, weight = layer.activation[0](inputs), layer.weight[0](original_weight(layer.module))
    watched = inputs[: 32 * group]
    wanted = {
        layer.weight: 2
        * x.square().sum(1).mean()
        / 18
        * squares(layer.weight, original_weight(layer.module)),
        layer.activation: 2
        / 3
        * weight.square().sum()
        / 6
        * squares(layer.activation, watched)
        / len(watched),
    }
    for quantizer, cost in wanted.items():
        tolerance = close if quantizer is layer.weight else 0.3
        torch.testing.assert_close(
            costs[quantizer.decision.name], cost.double() / 2, rtol=tolerance, atol=1e-12
        )


def squares(quantizer: MixedQuantizer, tensor: torch.Tensor) -> torch.Tensor:
    """Of the errors of all options, ``[K]``."""
    found = [quantizer[k](tensor) for k in range(len(quantizer.candidates))]
    return torch.stack([(each - tensor).double().square().sum() for each in found]).detach()


def test_the_softer_distance_is_one_too_and_costs_another_way_back() -> None:
    torch.manual_seed(0)
    inputs, start = images(16), 0
    of = evaluator(cnn(), inputs, KLDivergence())
    other = evaluator_of(of.supernet, inputs, of.parts, KLDivergence(temperature=2.0))
    wide = widest(of.supernet)
    assert not of.second_order(wide, "refine", group=1).alone
    start = of.meter.evaluations
    own, soft = of.second_order(wide, "refine", group=1, alone=True).alone
    assert of.meter.evaluations - start == 7 * 16
    # Other signs were drawn: the same in the mean, of all options of all decisions.
    wanted = sum(
        float(row.sum()) for row in other.second_order(wide, "refine", group=1, alone=True).alone[0].values()
    )
    assert sum(float(row.sum()) for row in soft.values()) == pytest.approx(wanted, rel=0.3)
    assert sum(float(row.sum()) for row in own.values()) != pytest.approx(wanted, rel=0.3)


def test_inputs_that_share_a_pass_give_the_same_in_the_mean() -> None:
    torch.manual_seed(0)
    inputs = images(2000, 6)
    of = evaluator(nn.Sequential(nn.Linear(6, 1)), inputs, MeanSquaredError(), size=4)
    assignment = widest(of.supernet)
    found = of.second_order(assignment, "refine").effects
    for name, wanted in measured(of, assignment).items():
        torch.testing.assert_close(found[name], wanted, rtol=0.2, atol=1e-5, check_dtype=False)


def test_around_the_widest_options_it_knows_what_bits_do_and_first_order_does_not() -> None:
    torch.manual_seed(0)
    model = cnn()
    with torch.no_grad():
        model[-1].weight *= 4  # type: ignore[operator]
    of = evaluator(model, images(64), KLDivergence())
    start = widest(of.supernet)
    wanted, second, first = (
        measured(of, start),
        of.second_order(start, "refine").effects,
        of.first_order(start, "refine"),
    )
    pairs = [
        (w, s, f) for n in wanted for w, s, f in zip(wanted[n], second[n], first[n], strict=True) if w > 1e-3
    ]
    assert len(pairs) > 10
    ratios = torch.tensor([float(s / w) for w, s, _ in pairs])
    flattered = torch.tensor([float(f / w) for w, _, f in pairs])
    assert 0.6 < ratios.median() < 1.6
    assert flattered.median() < 0.3


def test_the_widest_options_are_the_first_with_the_most_bits() -> None:
    supernet: Supernet = calibrated(cnn(), images(4), space=small_space([2, 5, 3], ["minmax", "mse"]))
    for name, k in widest(supernet).items():
        options = supernet.decisions[name].options
        assert options[k].spec.bits == 5 and k == min(j for j, o in enumerate(options) if o.spec.bits == 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize(
    "distance", [KLDivergence(), KLDivergence(temperature=3.0), MeanSquaredError()], ids=["kl", "soft", "mse"]
)
def test_the_scale_makes_the_covariance_the_hessian(distance: Distance, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    output = torch.randn(shape).double()
    count = output.numel()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=count))).double()
    vectors = torch.stack([distance.curvature_root(output, s.view(shape)).flatten() for s in signs])
    exact = hessian(lambda x: distance.per_sample(x, output).sum())(output).reshape(count, count)
    covariance = distance.curvature_scale(output) * vectors.T @ vectors / len(signs)
    torch.testing.assert_close(covariance, exact, rtol=1e-9, atol=1e-12)


def test_a_distance_without_a_hessian_is_left_at_first_order() -> None:
    torch.manual_seed(0)
    of = evaluator(cnn(), images(8), MeanAbsoluteError())
    start = widest(of.supernet)
    first, second = of.first_order(start, "refine"), of.second_order(start, "refine").effects
    for name, wanted in first.items():
        torch.testing.assert_close(second[name], wanted.double(), rtol=1e-4, atol=1e-6)
