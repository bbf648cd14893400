"""The user's network is left alone, and a recipe repeats to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dqss.errors import ModelError, NonFiniteError, StrategyError
from dqss.prepare import fingerprint, prepare, weights_sha256

Randomize = Callable[[nn.Module], nn.Module]


class Everything(nn.Module):
    """One of each thing that there is to prepare."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = timm.layers.StdConv2d(3, 8, 3, stride=2)
        self.norm = timm.layers.BatchNormAct2d(8)
        self.block = timm.models.byobnet.RepVggBlock(8, 8)
        self.head = weight_norm(nn.Linear(8, 5))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.block(self.norm(self.stem(x.mul_(scale))))
        return {"logits": self.head(x.mean((2, 3)))}


ALL = ["bake_parametrizations", "bake_weight_standardization", "reparameterize", "fold_batch_norm"]


@pytest.fixture
def model(randomize: Randomize) -> nn.Module:
    return randomize(Everything())


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 17, 17), "scale": 0.5}


def test_the_original_is_untouched(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.train()
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, state = inputs["x"].clone(), torch.get_rng_state()
    prepared = prepare(model, inputs)

    assert [entry.split()[0] for entry in prepared.recipe] == ALL
    assert not any(module.training for module in prepared.model.modules())
    assert torch.equal(inputs["x"], batch) and torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in prepared.model.parameters())


def test_a_recipe_repeats_to_the_bit_on_any_batch(model: nn.Module, inputs: dict[str, Any]) -> None:
    first = prepare(model, inputs)
    torch.manual_seed(99)
    again = prepare(model, {"x": torch.zeros(1, 3, 20, 12)}, recipe=first.recipe)
    one, two = first.model.state_dict(), again.model.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert again.recipe == first.recipe and again.weights_sha256 == first.weights_sha256


def test_a_recipe_does_exactly_its_steps(model: nn.Module, inputs: dict[str, Any]) -> None:
    prepared = prepare(model, inputs, recipe=["bake_parametrizations"])
    assert type(prepared.model.head) is nn.Linear
    assert type(prepared.model.stem) is timm.layers.StdConv2d
    assert type(prepared.model.norm) is timm.layers.BatchNormAct2d
    nothing = prepare(model, inputs, recipe=[])
    assert fingerprint(nothing.model) == fingerprint(model)


def test_an_unknown_step_names_its_near_match(model: nn.Module, inputs: dict[str, Any]) -> None:
    with pytest.raises(StrategyError, match="did you mean 'fold_batch_norm'"):
        prepare(model, inputs, recipe=["fold_batchnorm"])


def test_wrappers_come_off(model: nn.Module, inputs: dict[str, Any]) -> None:
    plain = prepare(model, inputs)
    inner = nn.Sequential(torch.compile(nn.Linear(3, 3)), nn.DataParallel(nn.Linear(3, 2)))
    bare = nn.Sequential(inner[0]._orig_mod, inner[1].module)
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        prepared = prepare(wrapped, inputs)
        assert type(prepared.model) is Everything
        assert prepared.weights_sha256 == plain.weights_sha256 == weights_sha256(wrapped)
        assert list(prepared.model.state_dict()) == list(plain.model.state_dict())
    assert fingerprint(inner) == fingerprint(bare)
    assert list(prepare(inner, torch.randn(2, 3)).model.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_sees_one_bit_a_name_a_shape_and_a_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).to(dtype)
    before, whole = fingerprint(model), weights_sha256(model)
    assert list(before) == sorted(model.state_dict()) and all(len(v) == 16 for v in before.values())
    model[0].weight.data.view(torch.int16)[0, 0] ^= 1
    changed = fingerprint(model)
    assert {name for name in before if before[name] != changed[name]} == {"0.weight"}
    assert weights_sha256(model) != whole
    seen = {
        weights_sha256(net)
        for net in (
            nn.ParameterDict({"a": torch.zeros(2, 3, dtype=dtype)}),
            nn.ParameterDict({"b": torch.zeros(2, 3, dtype=dtype)}),
            nn.ParameterDict({"a": torch.zeros(3, 2, dtype=dtype)}),
            nn.ParameterDict({"a": torch.zeros(2, 3, dtype=torch.float64)}),
        )
    }
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("stem.weight", float("nan")), ("norm.running_var", float("inf")), ("norm.running_mean", -float("inf"))],
)
def test_non_finite_weights_are_named(model: nn.Module, inputs: Any, name: str, value: float) -> None:
    model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(NonFiniteError, match=repr(name)):
        prepare(model, inputs)


def test_an_attention_mask_may_hold_minus_infinity() -> None:
    class Masked(nn.Linear):
        pass

    model = Masked(3, 3)
    model.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
    prepare(model, torch.randn(2, 3))
    model.mask[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'mask'"):
        prepare(model, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(3, 3), torch.randn(2, 4), "Linear fails on the batch"),
        (nn.LazyLinear(3), torch.randn(2, 4), "'weight' has no values yet"),
        (nn.Linear(3, 3, device="meta"), torch.randn(2, 3), "'weight' has no values yet"),
    ],
)
def test_models_that_cannot_be_prepared_say_why(model: nn.Module, batch: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        prepare(model, batch)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ModelError, match="TorchScript"):
        prepare(torch.jit.script(nn.Linear(3, 3)), torch.randn(2, 3))
