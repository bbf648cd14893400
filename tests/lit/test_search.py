"""The whole search on tiny networks: the promise, reproducibility, and what each part may see."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import dqss.discretize
from dqss.apply import apply_strategy
from dqss.attach import INPUT_QUANTIZER
from dqss.bundle import Bundle
from dqss.discretize import RefineSettings
from dqss.errors import DataError, NonFiniteError
from dqss.lit.build import _least_bits
from dqss.lit.contenders import Validation
from dqss.lit.schedules import SoftmaxSchedule
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import KLDivergence, MeanAbsoluteError, TaskLoss
from dqss.prepare import fingerprint
from dqss.progress import Reporter, Stage
from dqss.samples import Samples, split
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec
from tests.support.nets import THREE, cnn, images, small_space
from tests.support.searches import QUICK, quick


def selection_part(inputs: Tensor, seed: int) -> Tensor:
    return inputs[split(len(inputs), PTQSettings().parts, seed)[1]]


@pytest.mark.parametrize(
    ("seed", "space"),
    [
        (0, small_space(2)),
        (1, small_space(2)),
        (2, small_space(3, THREE)),
        (3, small_space([2, 4], ["minmax"])),
        (4, small_space(2, ["minmax"])),
        (5, small_space(2, skip=["0"])),
    ],
    ids=["two", "two again", "three", "bits", "one candidate", "skip"],
)
def test_never_worse_than_the_best_uniform_in_the_mean_of_both_parts(seed: int, space: SearchSpace) -> None:
    result, inputs = quick(seed, space)
    metrics = result.metrics
    searched, best = (metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform"))
    # measured again, on the rebuilt networks
    selected = split(len(inputs), QUICK.parts, seed)
    means = []
    for some in (inputs[part] for part in selected):
        with torch.no_grad():
            reference = result.model(some)
            found = KLDivergence()(result.quantized()(some), reference)
            with result.supernet.assign(result.discretized.assignments[metrics["best_uniform"]["name"]]):
                other = KLDivergence()(result.supernet(some), reference)
        means.append((float(found), float(other)))
    assert means[1] == pytest.approx((searched, best), rel=1e-3, abs=1e-6)
    assert sum(found for found, _ in means) <= 1.001 * sum(other for _, other in means) + 1e-6
    selection = selection_part(inputs, seed)
    assert metrics["float"]["selection"]["distance"] == pytest.approx(0, abs=1e-6)
    assert metrics["searched"]["selection"]["count"] == len(selection)


def test_same_seed_same_everything_other_seed_other_order() -> None:
    (first, _), (again, _), (other, _) = quick(3), quick(3), quick(4)

    def choices(result: SearchResult) -> list[Any]:
        return list(result.bundle.strategy.choices())

    assert choices(first) == choices(again)
    assert first.bundle.tensors.keys() == again.bundle.tensors.keys()
    assert all(
        torch.equal(first.bundle.tensors[key], again.bundle.tensors[key]) for key in first.bundle.tensors
    )
    for a, b in zip(first.supernet.arch_parameters(), again.supernet.arch_parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[row["soft_loss"] for row in result.history] for result in (first, again, other)]
    assert losses[0] == losses[1] and losses[0] != losses[2]
    assert first.metrics["evaluations"] == again.metrics["evaluations"]


def test_the_users_model_is_untouched() -> None:
    model, inputs = cnn(), images(24)
    model.train()
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    flags = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    result = search_ptq(model, inputs, small_space(2), QUICK)
    assert fingerprint(model) == before
    assert flags == [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert modules == [(name, type(module), module.training) for name, module in model.named_modules()]
    assert result.model is model


class Recording(Samples):
    """Samples that remember which were read, and in which stage of the search."""

    stage = "none"
    reads: list[tuple[str, int]]

    def batch(self, indices: Sequence[int]) -> Any:
        self.reads += [(self.stage, index) for index in indices]
        return super().batch(indices)


class Stages(Reporter):
    """Tells the samples which stage runs."""

    def __init__(self, samples: Recording) -> None:
        super().__init__()
        self.samples = samples

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        self.samples.stage = name
        yield Stage(self)
        self.samples.stage = "between"


def test_no_part_is_seen_where_it_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = images(32)
    samples = Recording.of(inputs)
    assert isinstance(samples, Recording)
    samples.reads = []
    for name in ("refine", "screen"):
        function = getattr(dqss.discretize, name)

        def staged(*args: Any, _function: Any = function, _name: str = name, **kwargs: Any) -> Any:
            before, samples.stage = samples.stage, _name
            try:
                return _function(*args, **kwargs)
            finally:
                samples.stage = before

        monkeypatch.setattr(dqss.discretize, name, staged)
    search_ptq(cnn(), samples, small_space(2, THREE), QUICK, seed=5, reporter=Stages(samples))
    search, select = (set(part) for part in split(32, QUICK.parts, 5))
    assert not search & select
    seen: dict[str, set[int]] = {}
    for stage, index in samples.reads:
        seen.setdefault(stage, set()).add(index)
    assert seen["calibrate"] == search
    assert seen["search"] <= search and seen["screen"] <= search
    assert seen["refine"] == search
    # The preparation looks at a batch, too; everything before the first look at the selection ...
    first = next(k for k, (_, index) in enumerate(samples.reads) if index in select)
    stages = [stage for stage, _ in samples.reads]
    assert first > max(k for k, stage in enumerate(stages) if stage in ("calibrate", "search"))


@pytest.mark.parametrize(("passes", "refining"), [(0, 0), (20, 8 + 3 * 8)])
def test_evaluations_equal_a_hand_count(passes: float, refining: int) -> None:
    inputs = images(12)  # parts of 8 and 4
    settings = PTQSettings(
        steps=2,
        batch_size=4,
        parts=(2 / 3, 1 / 3),
        discrete_every=1,
        discrete_images=2,
        refine=RefineSettings(passes=passes),
    )
    result = search_ptq(cnn(), inputs, small_space(2, ["minmax"]), settings)
    calibrate = 8
    search = 2 * (3 * 4 + 2)  # forward and backward of four images, two discrete ones
    screening = 8  # the only uniform strategy
    select = 4 + 3 * 4  # float, then refined, argmax and the uniform one
    compare = 2 * 8  # refined and the uniform one where they were chosen
    assert result.metrics["evaluations"] == calibrate + search + refining + screening + select + compare
    assert result.metrics["steps"] == 2


def test_the_float_network_runs_once_an_input() -> None:
    """Its outputs are kept from the calibration on; only what reports runs it again, once an image."""
    runs: Counter[str] = Counter()

    def count(layer: nn.Module, args: tuple[Tensor]) -> None:
        quantizer = getattr(layer, INPUT_QUANTIZER, None)
        runs["preparing" if quantizer is None else quantizer.mode.value] += len(args[0])

    model, inputs = cnn(), images(32)
    search, select = (len(part) for part in split(32, QUICK.parts, 0))
    model[-1].register_forward_pre_hook(count)  # goes along with the copy that is searched on
    x, y = images(16), torch.randint(0, 4, (16,))
    metric = Validation([(x, y)], lambda: MulticlassAccuracy(4), "top1")
    search_ptq(model, inputs, small_space(2), replace(QUICK, oracle=True), validation=metric)
    assert runs["observe"] == search
    assert runs["float"] == select + select + len(x)
    assert runs["discrete"] > 10 * runs["float"] and runs["relaxed"] > 0


class TwoLayers(nn.Module):
    """One layer whose input has an outlier that means nothing, one whose outlier means everything."""

    def __init__(self) -> None:
        super().__init__()
        self.outliers, self.signal = nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.outliers.weight[:, 0] = 0.0
            self.outliers.weight[0] *= 100.0
            self.signal.weight.zero_()[:, 0] = torch.tensor([-0.1, -0.03, 0.03, 0.1])

    def forward(self, x: Tensor) -> Tensor:
        return self.signal(self.outliers(x))


def test_finds_the_right_algorithm_where_it_is_known() -> None:
    model, inputs = TwoLayers(), torch.randn(64, 16)
    inputs[:, 0] = 1000.0
    tensor, channel = QuantSpec(4, False, PerTensor()), QuantSpec(8, True, PerChannel(0))
    options = (Candidate.of("minmax", tensor), Candidate.of("percentile", tensor, {"p": 85.0}))
    space = SearchSpace("known", (Rule((Candidate.of("minmax", channel),), options),))
    for schedule in (SoftmaxSchedule(), PTQSettings().schedule):
        settings = PTQSettings(steps=25, batch_size=16, learning_rate=0.2, schedule=schedule)
        result = search_ptq(model, inputs, space, settings)
        assert result.supernet.argmax() == {
            "outliers.activation": 1,
            "outliers.weight": 0,
            "signal.activation": 0,
            "signal.weight": 0,
        }
        layers = result.bundle.strategy.layers
        assert layers["outliers"].activation.algorithm == "percentile"
        assert layers["signal"].activation.algorithm == "minmax"
        searched, best = (
            result.metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform")
        )
        assert searched < 0.2 * best


def test_refinement_alone_finds_it_too() -> None:
    """Logits that hardly moved: the argmax is uniform, what was exported is not."""
    model, inputs = TwoLayers(), torch.randn(64, 16)
    inputs[:, 0] = 1000.0
    tensor, channel = QuantSpec(4, False, PerTensor()), QuantSpec(8, True, PerChannel(0))
    options = (Candidate.of("minmax", tensor), Candidate.of("percentile", tensor, {"p": 85.0}))
    space = SearchSpace("known", (Rule((Candidate.of("minmax", channel),), options),))
    settings = PTQSettings(
        steps=1, batch_size=16, learning_rate=1e-9, loss=lambda output, *rest: output.sum() * 0
    )
    result = search_ptq(model, inputs, space, settings)
    assert set(result.supernet.argmax().values()) == {0}
    assert result.bundle.strategy.layers["outliers"].activation.algorithm == "percentile"
    assert result.discretized.exported == "refined" and len(result.discretized.changes) == 1


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    result, inputs = quick(run_dir=tmp_path / "run")
    loaded = Bundle.load(tmp_path / "run")
    assert loaded.strategy == result.bundle.strategy
    applied = apply_strategy(result.model, loaded)
    with torch.no_grad(), result.supernet.assign(result.discretized.assignments[result.discretized.exported]):
        assert torch.equal(applied(inputs[:8]), result.supernet(inputs[:8]))
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + QUICK.steps and rows[0].startswith("step,soft_loss")
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_validation_rows_are_those_of_the_networks_themselves() -> None:
    torch.manual_seed(100)
    model, inputs = cnn(), images(32)
    x, y = images(16), torch.randint(0, 4, (16,))
    stream = list(zip(x.split(8), y.split(8), strict=True))
    validation = Validation(stream, lambda: MulticlassAccuracy(4, average="micro"), "top1")
    settings = replace(QUICK, oracle=True)
    result = search_ptq(model, inputs, small_space(2), settings, validation=validation)
    quantized = result.quantized()
    with torch.no_grad():
        for row, network in (("float", model), ("searched", quantized)):
            found = result.metrics[row]["validation"]
            logits = network(x)
            assert found["top1"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
            assert found["distance"] == pytest.approx(
                float(KLDivergence()(logits, model(x))), abs=1e-5, rel=1e-3
            )
            assert found["count"] == 16
        # The oracle is the best of all uniform strategies on the validation data.
        weights = [d for n, d in result.supernet.decisions.items() if n.endswith("weight")]
        inputs_ = [d for n, d in result.supernet.decisions.items() if n.endswith("activation")]
        best = float("inf")
        for w, a in itertools.product(range(2), range(2)):
            assignment = {d.name: w for d in weights} | {d.name: a for d in inputs_}
            with result.supernet.assign(assignment):
                best = min(best, float(KLDivergence()(result.supernet(x), model(x))))
    assert result.metrics["oracle_uniform"]["validation"]["distance"] == pytest.approx(
        best, rel=0.05, abs=1e-4
    )


def test_task_loss_and_image_distance() -> None:
    x, y = images(24), torch.randint(0, 4, (24,))
    samples = Samples.of([(x, y)], labelled=True)
    result = search_ptq(cnn(), samples, small_space(2), replace(QUICK, loss=TaskLoss()))
    losses = [row["soft_loss"] for row in result.history]
    assert all(0.05 < loss < 20 for loss in losses) and result.metrics["distance"] == "kl"

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    result = search_ptq(model, x, small_space(3), QUICK)
    assert result.metrics["distance"] == "mse"
    result = search_ptq(model, x, small_space(3), replace(QUICK, distance=MeanAbsoluteError()))
    selection = selection_part(x, 0)
    with torch.no_grad():
        wanted = F.l1_loss(result.quantized()(selection), model(selection))
    assert result.metrics["searched"]["selection"]["distance"] == pytest.approx(float(wanted), rel=1e-4)


def test_inputs_of_many_kinds() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, *, gate: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.b(torch.tanh(self.a(x)) * gate)}

    batches = [{"x": torch.randn(6, 5), "gate": torch.rand(6, 8), "bias": None} for _ in range(3)]
    result = search_ptq(TwoInputs(), batches, small_space(2), QUICK)
    whole = {key: torch.cat([b[key] for b in batches]) for key in ("x", "gate")}
    assignment = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(assignment):
        assert torch.equal(result.quantized()(**whole)["logits"], result.supernet(**whole)["logits"])

    # Images of different sizes can only go one by one.
    sizes = [torch.randn(1, 3, 6 + k % 3, 7) for k in range(9)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    result = search_ptq(model, sizes, small_space(2), QUICK)
    assert len(result.history) == QUICK.steps


def test_bad_inputs_are_refused_in_one_line() -> None:
    for inputs, kind, message in (
        (images(1), DataError, "at least 2"),
        ([], DataError, "empty"),
        (images(8) * float("nan"), NonFiniteError, "input of layer '0'"),
    ):
        with pytest.raises(kind, match=message) as caught:
            search_ptq(cnn(), inputs, small_space(2), QUICK)
        assert "\n" not in str(caught.value)


def test_time_limit_exports_the_best_so_far() -> None:
    result, _ = quick(settings=replace(QUICK, steps=100_000, max_minutes=0.02))
    assert 0 < len(result.history) < 100_000
    searched, best = (result.metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform"))
    assert searched <= best


def test_smoothing_sees_the_part_searched_on_and_the_fewest_bits_and_is_rebuilt() -> None:
    torch.manual_seed(0)
    model, inputs = cnn(), images(20)
    sizes = torch.tensor([1.0, 1, 4, 8, 16, 32])  # of what the last layer reads, all of it equally important
    with torch.no_grad():
        model[3].weight.mul_(sizes.reshape(-1, 1, 1, 1))
        model[3].bias.mul_(sizes)  # type: ignore[operator]
    last = nn.Conv2d(6, 5, 2)
    with torch.no_grad():
        last.weight.div_(sizes.reshape(1, -1, 1, 1))
    grouped = nn.Sequential(*model[:5], last, nn.Flatten()).eval()
    settings = replace(QUICK, smooth=True)
    space = small_space([3, 5], ["minmax", "mse"], edges=["5"], edge_bits=8)
    results = [search_ptq(grouped, given, space, settings) for given in (inputs, _others_selected(inputs))]
    recipes = [result.bundle.strategy.model.prepare for result in results]
    assert recipes[0] == recipes[1]  # whatever the selection part holds
    assert any(entry.startswith("smooth ") and " 3>5:" in entry for entry in recipes[0])
    result = results[0]
    with torch.no_grad(), result.supernet.assign(result.discretized.assignments["refined"]):
        assert torch.equal(apply_strategy(grouped, result.bundle)(inputs), result.supernet(inputs))
    bits = _least_bits(grouped, space)
    assert [bits(name) for name in ("0", "3", "5", "none")] == [(3, 3), (3, 3), (8, 8), (None, None)]


def _others_selected(inputs: Tensor) -> Tensor:
    changed, selected = inputs.clone(), split(len(inputs), QUICK.parts, 0)[1]
    changed[selected] = 5 * torch.randn_like(changed[selected])
    return changed
