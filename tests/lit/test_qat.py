"""QAT: everything learns from one loss in one pass, and the result is what was trained."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.apply import apply_strategy
from dqss.bundle import load
from dqss.errors import DataError, NonFiniteError, OutputError, SearchSpaceError, UserError
from dqss.fused import fused
from dqss.lit.checkpoint import Deadline
from dqss.lit.qat_fit import fit_qat
from dqss.lit.qat_search import search_qat
from dqss.lit.qat_settings import QATSettings
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, SoftmaxSchedule
from dqss.lit.training_data import TrainingData
from dqss.lit.updates import Bilevel
from dqss.progress import Interrupted, Reporter
from dqss.samples import Samples
from tests.support.nets import cnn, images
from tests.support.training import CPU, SPACE, Stopping, pairs, tiny_search, trainable, training

SCHEDULES = {
    "softmax": SoftmaxSchedule(entropy=0.1),
    "gumbel": GumbelSchedule(),
    "mean_field": MeanFieldSchedule(reheats=0),
}


@pytest.fixture(autouse=True)
def eager():
    with fused(False):
        yield


def fit(module, folder: Path | None = None) -> None:
    fit_qat(module, folder, Deadline(None), 1.0, Reporter(), CPU, False)


# -- one pass ---------------------------------------------------------------------------------


def test_one_pass_has_the_gradients_of_all_pairs() -> None:
    """The N x M convolutions, summed by hand, lead to the same gradient of everything that learns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 4))
    supernet = trainable(model)
    for quantizer in supernet.quantizers():
        quantizer.compensate = False
        quantizer.decision.logits.data.normal_()
    inputs, labels = pairs(8)
    with supernet.mode("relaxed"):
        loss = F.cross_entropy(supernet(inputs), labels)
    learnable = supernet.learnable()
    everything = [*learnable.weights, *learnable.quantizers, *learnable.logits]
    found = torch.autograd.grad(loss, everything, allow_unused=True)

    def by_pairs(name: str, x: Tensor) -> Tensor:
        layer = supernet.layers[name]
        weight, bias = layer.module.parametrizations.weight.original, layer.module.bias
        alpha = layer.activation.decision.logits.softmax(0)
        beta = layer.weight.decision.logits.softmax(0)
        total = 0
        for i in range(len(alpha)):
            for j in range(len(beta)):
                operand, kernel = layer.activation[i](x), layer.weight[j](weight)
                product = F.conv2d(operand, kernel) if kernel.ndim == 4 else F.linear(operand, kernel)
                total = total + alpha[i] * beta[j] * product
        return total if bias is None else total + bias

    expected = by_pairs("2", by_pairs("0", inputs).flatten(1))
    wanted = torch.autograd.grad(F.cross_entropy(expected, labels), everything, allow_unused=True)
    assert len(learnable.weights) == 3 and len(learnable.logits) == 4 and len(learnable.quantizers) >= 8
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_one_step_moves_everything_with_one_optimizer() -> None:
    supernet = trainable(cnn())
    before = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    module = training(supernet, batches=2)
    optimizer = module.configure_optimizers()["optimizer"]
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "quantizers", "logits"]
    assert optimizer.param_groups[2]["weight_decay"] == 0
    fit(module)
    assert module.global_step == 2
    moved = {name for name, p in supernet.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.endswith("logits") for name in moved)
    assert any(name.endswith("step") for name in moved)
    assert "model.0.parametrizations.weight.original" in moved and "model.1.weight" in moved


def test_logits_stand_still_while_it_warms_up() -> None:
    module = training(trainable(cnn()), batches=8, warmup=0.5)
    fit(module)
    margins = [row["margin_mean"] for row in module.history]
    assert margins[:5] == [0.0] * 5 and all(margin > 0 for margin in margins[5:])


def test_bilevel_moves_logits_and_weights_in_turn() -> None:
    supernet = trainable(cnn())
    module = training(supernet, update=Bilevel())
    plans = module.phase.update.plans(48, 8, 3)
    assert not set(plans[0].items) & set(plans[1].items)
    learnable = supernet.learnable()
    for step in range(4):
        module._prepare(step)
        moving = {
            id(p) for p in (*learnable.weights, *learnable.quantizers, *learnable.logits) if p.requires_grad
        }
        wanted = learnable.logits if step % 2 else [*learnable.weights, *learnable.quantizers]
        assert moving == {id(p) for p in wanted}


# -- the result -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_rebuilt_is_what_was_trained(schedule: str, tmp_path: Path) -> None:
    model = cnn()
    untouched = copy.deepcopy(model.state_dict())
    result = tiny_search(model, run_dir=tmp_path, changes={"schedule": SCHEDULES[schedule]})
    inputs = images(5)
    with torch.no_grad(), result.supernet.mode("discrete"):
        wanted = result.supernet(inputs)
    assert torch.equal(result.quantized()(inputs), wanted)
    assert torch.equal(apply_strategy(model, load(tmp_path))(inputs), wanted)
    assert not torch.allclose(model(inputs), wanted)
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())


def test_tuning_from_float_starts_from_the_float_weights() -> None:
    model = cnn()
    result = tiny_search(model, changes={"start": "float", "learning_rate": 1e-12, "quantizer_rate": 0.0})
    tuned = result.supernet.network_state()
    for name, value in model.named_parameters():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=1e-9)


def test_training_lowers_the_loss() -> None:
    result = tiny_search(cnn(), changes={"epochs": 10, "tune_epochs": 10, "learning_rate": 0.01})
    losses = [row["soft_loss"] for row in result.history]
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6])


def test_folded_batch_norms_leave_none_to_estimate() -> None:
    result = tiny_search(cnn(), changes={"fold_batch_norm": True})
    assert result.bundle.strategy.model.prepare == ["fold_batch_norm 0>1"]
    inputs = images(5)
    with torch.no_grad(), result.supernet.mode("discrete"):
        assert torch.equal(result.quantized()(inputs), result.supernet(inputs))


# -- interruptions ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_and_resumed_it_ends_the_same_bit_for_bit(schedule: str, tmp_path: Path) -> None:
    changes = {"schedule": SCHEDULES[schedule]}
    model = nn.Sequential(cnn()[0], cnn()[1], nn.ReLU(), nn.Dropout(0.2), *cnn()[3:])
    wanted = tiny_search(model, run_dir=tmp_path / "whole", changes=changes)
    for stage, after in (("search", 5), ("search", 9), ("measure", 1), ("tune", 3)):
        with pytest.raises(Interrupted):
            tiny_search(model, run_dir=tmp_path / "cut", changes=changes, reporter=Stopping(stage, after))
    found = tiny_search(model, run_dir=tmp_path / "cut", changes=changes)
    assert found.bundle.strategy.layers == wanted.bundle.strategy.layers
    assert found.bundle.tensors.keys() == wanted.bundle.tensors.keys()
    assert all(torch.equal(value, wanted.bundle.tensors[key]) for key, value in found.bundle.tensors.items())
    assert [row["soft_loss"] for row in found.history] == [row["soft_loss"] for row in wanted.history]


def test_another_search_does_not_go_on_in_its_folder(tmp_path: Path) -> None:
    model = cnn()
    tiny_search(model, run_dir=tmp_path)
    with pytest.raises(OutputError, match="other settings"):
        tiny_search(model, run_dir=tmp_path, changes={"epochs": 3})


def test_checkpoints_hold_plain_things_only(tmp_path: Path) -> None:
    tiny_search(cnn(), run_dir=tmp_path)
    for name in ("search", "tune"):
        torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)


# -- what goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_says_what_to_do() -> None:
    with pytest.raises(NonFiniteError, match="lower method"):
        tiny_search(cnn(), changes={"loss": lambda output, reference, targets: output.sum() * float("nan")})


def test_a_scale_that_is_lost_is_named() -> None:
    supernet = trainable(cnn())
    quantizer = supernet.layers["3"].weight
    quantizer[0].step.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="of lsq@3 in"):
        supernet.constrain()


def test_a_negative_scale_is_put_back() -> None:
    supernet = trainable(cnn())
    quantizer = supernet.layers["3"].weight
    quantizer[0].step.data.fill_(-1.0)
    supernet.constrain()
    assert bool((quantizer[0].step > 0).all())


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    result = tiny_search(cnn(), changes={"batch_size": 1000})
    assert result.metrics["steps"] == 3


def test_products_are_refused() -> None:
    with pytest.raises(SearchSpaceError, match="method=ptq only"):
        tiny_search(cnn(), replace(SPACE, products=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "flaot"}, "did you mean 'float'"),
        ({"epochs": 0}, "method.epochs=0"),
        ({"warmup": 1.5}, "method.warmup=1.5"),
        ({"max_minutes": 0}, "max_minutes"),
    ],
)
def test_settings_are_checked(options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        QATSettings(**options)


def test_without_labels_it_learns_from_the_float_network() -> None:
    inputs, _ = pairs()
    settings = QATSettings(epochs=2, tune_epochs=2, batch_size=8)
    result = search_qat(cnn(), Samples(list(inputs)), inputs, SPACE, settings, trainer=CPU)
    assert result.metrics["searched"]["selection"]["distance"] > 0


def test_no_training_data_is_one_line() -> None:
    with pytest.raises(DataError, match="empty"):
        TrainingData.of(torch.utils.data.TensorDataset(torch.zeros(0, 3)))
    with pytest.raises(DataError, match="expected a DataLoader"):
        TrainingData.of([1, 2])
