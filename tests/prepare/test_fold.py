"""Batch norms fold into what they follow, exactly where that changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from dqss.calls import call_model
from dqss.prepare import fold, prepare

Randomize = Callable[[nn.Module], nn.Module]


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm2d))]


def assert_same_output(one: nn.Module, other: nn.Module, inputs: Any, limit: float = 1e-5) -> None:
    with torch.no_grad():
        a, b = call_model(one, inputs), call_model(other, inputs)
    for x, y in zip(*(v if isinstance(v, tuple) else (v,) for v in (a, b)), strict=True):
        assert (x - y).abs().max() <= limit * x.abs().max()


FOLDABLE: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    (timm.layers.Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    (nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), (2, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 5, 5, 5)),
    (nn.Linear(5, 7), nn.BatchNorm1d(7), (3, 5)),
    (nn.Linear(5, 7, bias=False), nn.SyncBatchNorm(7), (3, 5)),
    (nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3), timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3).bfloat16(), nn.BatchNorm2d(6).bfloat16(), (2, 4, 9, 9)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), FOLDABLE)
def test_a_folded_norm_is_the_same_function(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], randomize: Randomize
) -> None:
    layer.reset_parameters()
    model = randomize(nn.Sequential(layer, nn.Dropout(), norm))
    dtype = next(layer.parameters()).dtype
    limit = max(2e-6, 4 * torch.finfo(dtype).eps)
    prepared = prepare(model, torch.randn(shape, dtype=dtype))
    assert prepared.recipe == ["fold_batch_norm 0>2"] and not prepared.notes
    assert norms(prepared.model) == []
    assert_same_output(model, prepared.model, torch.randn(shape, dtype=dtype), limit)


class Net(nn.Module):
    """A convolution and a norm, joined by ``body``."""

    def __init__(self, body: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.body = nn.BatchNorm2d(4), body
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _residual(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


def _viewed(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    view = y.view(-1)
    return net.norm(y).view(-1) * view


def _returned(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.conv(x)
    return net.norm(y), y


def _stored(net: Net, x: Tensor) -> Tensor:
    net.kept = net.conv(x)
    return net.norm(net.kept)


def _changed_after(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.norm(y)
    return z + y.relu_()


def _conv_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(net.conv(x)))


def _norm_twice(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.other(net.norm(net.conv(x))))


def _weight_read(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)


def _norm_first(net: Net, x: Tensor) -> Tensor:
    return net.conv(net.norm(x))


def _activation_between(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).relu_())


def _concatenated(net: Net, x: Tensor) -> Tensor:
    return net.norm(torch.cat([net.conv(x)[:, :2], x[:, :2]], 1))


@pytest.mark.parametrize(
    "body",
    [
        _residual,
        _viewed,
        _returned,
        _stored,
        _changed_after,
        _conv_twice,
        _norm_twice,
        _weight_read,
        _norm_first,
        _activation_between,
        _concatenated,
    ],
)
def test_a_norm_that_is_not_the_only_reader_stays(body: Any, randomize: Randomize) -> None:
    model = randomize(Net(body))
    inputs = torch.randn(2, 4, 6, 6)
    prepared = prepare(model, inputs)
    assert prepared.recipe == [] and norms(prepared.model) == ["norm"] and not prepared.notes
    assert_same_output(model, prepared.model, inputs, 0.0)


def test_shared_weights_stay(randomize: Randomize) -> None:
    model = randomize(Net(lambda net, x: net.norm(net.conv(x)) + net.other(x)))
    assert norms(prepare(model, torch.randn(2, 4, 6, 6)).model) == []
    model.other.weight = model.conv.weight
    assert norms(prepare(model, torch.randn(2, 4, 6, 6)).model) == ["norm"]


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(5, 4), nn.BatchNorm1d(4), (2, 4, 5)),  # its channels are axis 1, not the features
        (nn.Conv1d(3, 7, 3, padding=1), nn.BatchNorm1d(7), (3, 7)),  # without a batch axis
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), (2, 3, 7, 7)),
        (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 3, 7, 7)),
    ],
)
def test_norms_over_other_axes_or_batch_statistics_stay(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], randomize: Randomize
) -> None:
    model = randomize(nn.Sequential(layer, norm))
    inputs = torch.randn(shape)
    prepared = prepare(model, inputs)
    assert type(prepared.model[1]) is type(norm)
    assert_same_output(model, prepared.model, inputs, 0.0)


class Clipped(nn.BatchNorm2d):
    """A subclass that does more than its parts say."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.5, 0.5)


class Reading(nn.Module):
    """A network that looks into its norm, which a folded one cannot answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.third = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x))) * self.second[1].running_var.sum()


def test_a_norm_of_unknown_kind_stays(randomize: Randomize) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), Clipped(4)))
    assert norms(prepare(model, torch.randn(2, 3, 7, 7)).model) == ["1"]


def test_a_fold_that_breaks_the_network_is_undone_alone_and_recorded(randomize: Randomize) -> None:
    model, inputs = randomize(Reading()), torch.randn(2, 3, 9, 9)
    prepared = prepare(model, inputs)
    assert norms(prepared.model) == ["second.1"]
    assert "second.1" not in prepared.recipe[0] and "second.1" in prepared.notes[0]
    assert_same_output(model, prepared.model, inputs)
    again = prepare(model, torch.zeros_like(inputs), recipe=prepared.recipe)
    assert norms(again.model) == ["second.1"] and not again.notes


def test_a_wrong_fold_does_not_survive_verification(
    randomize: Randomize, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fold.folded_parameters

    def wrong(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
        weight, bias = right(layer, norm)
        return (weight * 1.01 if layer is not norm and weight.shape[0] == 5 else weight), bias

    monkeypatch.setattr(fold, "folded_parameters", wrong)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    assert norms(prepare(randomize(model), torch.randn(2, 3, 9, 9)).model) == ["1"]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (torchvision.models.get_model, "resnet18"),
        (torchvision.models.get_model, "mobilenet_v2"),
        (timm.create_model, "mobilenetv2_100"),
        (timm.create_model, "efficientnet_lite0"),
    ],
)
def test_real_networks_keep_no_norm(
    build: Callable[[str], nn.Module], name: str, randomize: Randomize
) -> None:
    model = randomize(build(name))
    prepared = prepare(model, torch.randn(2, 3, 64, 64))
    assert norms(prepared.model) == [] and not prepared.notes
    assert_same_output(model, prepared.model, torch.randn(2, 3, 64, 64), 1e-4)


def test_norms_before_convolutions_stay_in_densenet(randomize: Randomize) -> None:
    model = randomize(torchvision.models.DenseNet(8, (2, 2), num_init_features=8, num_classes=10))
    prepared = prepare(model, torch.randn(2, 3, 64, 64))
    folded = {name.rsplit(".", 1)[-1] for name in set(norms(model)) - set(norms(prepared.model))}
    assert folded == {"norm0", "norm2"}
    assert {name.rsplit(".", 1)[-1] for name in norms(prepared.model)} == {"norm1", "norm", "norm5"}
    assert_same_output(model, prepared.model, torch.randn(2, 3, 64, 64), 1e-5)
