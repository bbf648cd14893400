"""What users give Lightning's trainer does in QAT what it does anywhere."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor

from dqss.fused import fused
from dqss.lit.checkpoint import Deadline
from dqss.lit.qat_fit import fit_qat
from dqss.progress import Interrupted, Reporter
from tests.support.nets import cnn, images
from tests.support.training import CPU, Stopping, tiny_search, trainable, training

DECAY = 0.5


@pytest.fixture(autouse=True)
def eager():
    with fused(False):
        yield


class Watch(pl.Callback):
    """Remembers gradients' norms and the weights at the end of every batch."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, module, *rest: Any) -> None:
        gradients = [p.grad.flatten() for p in module.supernet.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        self.states.append({name: p.detach().clone() for name, p in module.supernet.named_parameters()})


def fitted(batches: int, batch_size: int = 8, **trainer: Any) -> dict[str, Tensor]:
    """Parameters of the small network (no batch norm) after so many batches."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 4)
    )
    for k, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(k))
    supernet = trainable(model)
    module = training(supernet, batches, batch_size=batch_size)
    module.accumulate = int(trainer.get("accumulate_grad_batches", 1))
    fit_qat(module, None, Deadline(None), 1.0, Reporter(), {**CPU, **trainer}, False)
    return {name: p.detach().clone() for name, p in supernet.named_parameters()}


def test_two_accumulated_batches_are_one_of_twice_the_size() -> None:
    apart, together = fitted(6, 8, accumulate_grad_batches=2), fitted(3, 16)
    assert apart.keys() == together.keys()
    for name, value in together.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_are_clipped_before_the_optimizer_sees_them() -> None:
    free, clipped = Watch(), Watch()
    fitted(3, callbacks=[free])
    fitted(3, callbacks=[clipped], gradient_clip_val=0.05)
    assert min(free.norms) > 0.1 and max(clipped.norms) <= 0.05 * (1 + 1e-5)


def test_under_bf16_parameters_stay_fp32_and_the_result_is_what_was_trained() -> None:
    model = cnn()
    exact = tiny_search(model)
    result = tiny_search(model, trainer={"precision": "bf16-mixed"})
    assert result.history[0]["soft_loss"] == pytest.approx(exact.history[0]["soft_loss"], rel=2e-2)
    assert result.history[0]["soft_loss"] != exact.history[0]["soft_loss"]
    assert {p.dtype for p in result.supernet.parameters() if p.is_floating_point()} == {torch.float32}
    inputs = images(5)
    with torch.no_grad(), result.supernet.mode("discrete"):
        assert torch.equal(result.quantized()(inputs), result.supernet(inputs))


def test_averaged_weights_are_those_of_the_formula() -> None:
    watch = Watch()
    found = fitted(6, callbacks=[watch, EMAWeightAveraging(decay=DECAY)])
    # Lightning's first average is a copy of the first state.
    wanted = dict(watch.states[0])
    for state in watch.states[1:]:
        wanted = {name: DECAY * wanted[name] + (1 - DECAY) * value for name, value in state.items()}
    last = watch.states[-1]
    assert any(not torch.allclose(found[name], value) for name, value in last.items())
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"callbacks": [EMAWeightAveraging(decay=DECAY)]},
    ],
    ids=["accumulated", "bf16", "averaged"],
)
def test_interrupted_they_go_on_as_if_nothing_had_been(options: dict[str, Any], tmp_path: Path) -> None:
    model = cnn()
    whole = tiny_search(model, run_dir=tmp_path / "whole", trainer=options)
    with pytest.raises(Interrupted):
        tiny_search(model, run_dir=tmp_path / "cut", trainer=options, reporter=Stopping("search", 5))
    again = tiny_search(model, run_dir=tmp_path / "cut", trainer=options)
    assert again.bundle.strategy.layers == whole.bundle.strategy.layers
    wanted = whole.supernet.network_state()
    for name, value in again.supernet.network_state().items():
        assert torch.equal(value, wanted[name]), name
