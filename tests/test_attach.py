"""Attaching leaves the layer what it was: class, attributes, names, and it can be undone."""

import copy

import torch
from torch import Tensor, nn

from dqss.attach import attach_input, attach_weight, detach_input, detach_weight, original_weight


class Times(nn.Module):
    """A stand-in for a quantizer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Joined(nn.Linear):
    """A subclass that takes keyword arguments and things that are not tensors."""

    def forward(self, flag: bool, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if shift is None or not flag else y + shift


def test_layer_keeps_class_attributes_and_state() -> None:
    layer = nn.Conv2d(3, 4, 3)
    weight = layer.weight
    attach_weight(layer, Times(2.0))
    attach_input(layer, Times(10.0))
    assert isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    assert torch.equal(layer.weight, 2 * weight) and original_weight(layer) is weight
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(10 * x, 2 * weight, layer.bias))


def test_detaching_brings_everything_back() -> None:
    layer = nn.Linear(3, 4)
    before, x = dict(vars(layer)), torch.randn(2, 3)
    wanted, weight, names = layer(x), layer.weight, set(layer.state_dict())
    attach_input(layer, Times(3.0))
    attach_weight(layer, Times(2.0))
    detach_weight(layer)
    detach_input(layer)
    assert layer.weight is weight and type(layer) is nn.Linear
    assert torch.equal(layer(x), wanted) and set(layer.state_dict()) == names
    assert set(vars(layer)) == set(before)
    assert not layer._forward_pre_hooks and not layer._forward_pre_hooks_with_kwargs


def test_detaching_leaves_the_users_own_hooks() -> None:
    layer = nn.Linear(3, 4)
    seen: list[int] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(1))
    attach_input(layer, Times(3.0))
    detach_input(layer)
    layer(torch.randn(2, 3))
    assert seen == [1]


def test_only_the_first_tensor_is_quantized() -> None:
    layer = Joined(3, 3)
    x, shift = torch.randn(2, 3), torch.randn(3)
    wanted = layer(True, 5 * x, shift=shift)
    by_name = layer(flag=True, x=5 * x)
    attach_input(layer, Times(5.0))
    assert torch.equal(layer(True, x, shift=shift), wanted)
    assert torch.equal(layer(flag=True, x=x), by_name)


def test_copies_do_not_share_quantizers() -> None:
    layer = nn.Linear(3, 4)
    attach_weight(layer, Times(2.0))
    attach_input(layer, Times(10.0))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3)
    wanted = layer(x)
    assert torch.equal(twin(x), wanted)
    twin.input_quantizer.factor = 0.0
    assert torch.equal(layer(x), wanted)
    torch.testing.assert_close(twin(x), layer.bias.expand(2, 4))


def test_tied_layers_stay_tied_underneath() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    attach_weight(first, Times(2.0))
    assert original_weight(first) is original_weight(second)
    attach_weight(second, Times(3.0))
    with torch.no_grad():
        original_weight(first).fill_(1.0)
    assert (second.weight == 3.0).all() and (first.weight == 2.0).all()
