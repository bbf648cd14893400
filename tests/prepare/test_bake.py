"""What computes its weight becomes a plain layer; multi-branch blocks become one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from dqss.errors import ModelError
from dqss.prepare import PaddedConv2d, prepare

Randomize = Callable[[nn.Module], nn.Module]


def relative(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        a, b = one(inputs), other(inputs)
    return float((a - b).abs().max() / a.abs().max())


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tril() + x.tril(-1).mT


def _symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        spectral_norm,
        _pruned,
        _symmetric,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_computed_weights_become_plain_parameters(wrap: Any, trained: bool) -> None:
    model = nn.Sequential(wrap(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(trained)
    inputs = torch.randn(4, 6)
    model(inputs)  # leaves computed tensors in the modules, which do not copy by themselves
    model.eval()
    before, kind = copies(model), type(model[0])
    prepared = prepare(model, inputs)

    layer = prepared.model[0]
    assert prepared.recipe == ["bake_parametrizations"]
    assert type(layer) is nn.Linear and sorted(layer.state_dict()) == ["bias", "weight"]
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad is trained
    assert not layer._forward_pre_hooks
    assert relative(model, prepared.model, inputs) <= 1e-6
    # The original still computes its weight: torch's own removal would have edited its class.
    assert type(model[0]) is kind
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1.5)
    assert relative(model, prepared.model, inputs) > 1e-3


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
def test_weight_standardization_is_baked_for_every_input_size(kind: Any, kernel: int, stride: int) -> None:
    model = nn.Sequential(kind(4, 6, kernel, stride=stride, groups=2, bias=True)).eval()
    prepared = prepare(model, torch.randn(2, 4, 12, 11))
    assert prepared.recipe == ["bake_weight_standardization"]
    assert type(prepared.model[0]) in (nn.Conv2d, PaddedConv2d)
    weight = prepared.model[0].weight
    assert weight.mean(dim=(1, 2, 3)).abs().max() <= 1e-6 and not torch.equal(weight, model[0].weight)
    for size in range(5, 14):
        assert relative(model, prepared.model, torch.randn(1, 4, size, 19 - size)) <= 1e-5


class Centered(nn.Linear):
    """Linear in its weight, and yet it multiplies another one."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Reflected(nn.Conv2d):
    """Standardized by hand, through torch's own padding modes."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, F.normalize(self.weight, dim=1), self.bias)


class Framed(nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        weight = torch.tanh(self.weight)
        return F.conv_transpose1d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Adapted(nn.Linear):
    """A low-rank side branch: affine in the weight, and the weight itself is multiplied."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.side = nn.Parameter(torch.randn(self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(input, self.side)


class Squashed(nn.Linear):
    """Nonlinear in its weight, and no plain layer computes it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


@pytest.mark.parametrize(
    ("layer", "plain", "shape"),
    [
        (Centered(6, 4), nn.Linear, (3, 5, 6)),
        (Reflected(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d, (2, 3, 8, 8)),
        (Reflected(3, 4, 3, stride=2, padding="valid"), nn.Conv2d, (2, 3, 8, 8)),
        (Framed(3, 4, 3, stride=2, padding=1, bias=False), nn.ConvTranspose1d, (2, 3, 8)),
    ],
)
def test_any_forward_that_multiplies_another_weight_is_baked(
    layer: nn.Module, plain: type, shape: tuple[int, ...]
) -> None:
    layer.reset_parameters()
    model = nn.Sequential(layer).eval()
    prepared = prepare(model, torch.randn(shape))
    assert type(prepared.model[0]) is plain
    assert relative(model, prepared.model, torch.randn(shape)) <= 1e-5


def test_side_branches_stay_and_are_never_folded_wrongly(randomize: Randomize) -> None:
    model = randomize(nn.Sequential(Adapted(6, 4), nn.BatchNorm1d(4)))
    inputs = torch.randn(5, 6)
    prepared = prepare(model, inputs)
    assert isinstance(prepared.model[0], Adapted) and isinstance(prepared.model[1], nn.BatchNorm1d)
    assert relative(model, prepared.model, inputs) == 0


def test_a_layer_that_is_nonlinear_in_its_weight_is_refused_by_name(randomize: Randomize) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 6), Squashed(6, 4), nn.BatchNorm1d(4), Centered(4, 2)))
    inputs = torch.randn(5, 6)
    with pytest.raises(ModelError, match=r"layer '1' \(Squashed\).*search_space.skip=\[1\]"):
        prepare(model, inputs)
    skipped = prepare(model, inputs, skip=lambda name: name == "1")
    assert isinstance(skipped.model[1], Squashed) and isinstance(skipped.model[2], nn.BatchNorm1d)
    assert skipped.recipe == ["bake_weight_standardization -1"]
    assert type(prepare(model, inputs, recipe=skipped.recipe).model[3]) is nn.Linear


def _small_bit() -> nn.Module:
    return ResNetV2(
        layers=[1, 1, 1, 1],
        channels=[16, 32, 48, 64],
        num_classes=10,
        stem_type="fixed",
        conv_layer=StdConv2d,
        norm_layer=lambda width, **options: GroupNormAct(width, num_groups=2, **options),
    )


@pytest.mark.parametrize("build", [_small_bit, lambda: timm.create_model("nf_regnet_b0", num_classes=10)])
def test_weight_standardized_networks_become_plain(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    inputs = torch.randn(2, 3, 64, 64)
    prepared = prepare(model, inputs)
    kinds = {type(m) for m in prepared.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert kinds <= {nn.Conv2d, PaddedConv2d, nn.Linear}
    assert prepared.recipe == ["bake_weight_standardization"]
    assert relative(model, prepared.model, torch.randn(2, 3, 80, 80)) <= 1e-4


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9"])
def test_multi_branch_blocks_are_merged(name: str, randomize: Randomize) -> None:
    model, inputs = randomize(timm.create_model(name, num_classes=10)), torch.randn(2, 3, 64, 64)
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    prepared = prepare(model, inputs)
    assert prepared.recipe[0] == "reparameterize" and not prepared.notes
    assert not [m for m in prepared.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert relative(model, prepared.model, torch.randn(2, 3, 64, 64)) <= 1e-4
    assert all(p.requires_grad for n, p in prepared.model.named_parameters() if not n.startswith("stem"))


class Block(nn.Module):
    """``2 x`` as two branches; ``way`` is how its merging goes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + (0 if self.b is None else self.b(x))

    def reparameterize(self) -> None:
        with torch.no_grad():
            self.a.weight += self.b.weight * (0.9 if self.way == "wrong" else 1)
            if self.way == "raises":
                raise RuntimeError("half done")
            self.a.bias += self.b.bias
        self.b = None


class Fusion(nn.Linear):
    def fuse(self, other: Tensor) -> Tensor:  # not a merging method: it wants something
        raise AssertionError("called")


def _blocks() -> Iterator[nn.Module]:
    for way in ("right", "wrong", "right", "raises"):
        yield Block(way)
    yield Fusion(4, 2)


def test_blocks_that_merge_wrongly_keep_their_branches() -> None:
    model, inputs = nn.Sequential(*_blocks()).eval(), torch.randn(3, 4)
    prepared = prepare(model, inputs)
    assert [block.b is None for block in list(prepared.model)[:4]] == [True, False, True, False]
    assert prepared.recipe == ["reparameterize -1 -3"] and "1, 3" in prepared.notes[0]
    assert relative(model, prepared.model, inputs) <= 1e-6
    again = prepare(model, torch.zeros(1, 4), recipe=prepared.recipe)
    assert [block.b is None for block in list(again.model)[:4]] == [True, False, True, False]
