"""What is made again on the way back is what it was; and it is not held in between."""

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dqss import recompute
from dqss.decision import Sampled
from dqss.recompute import Recomputation, offer
from dqss.supernet import Supernet
from tests.support.nets import small_space


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LARGE", 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(2),
        nn.Linear(196, 5),
    )


def gradients(supernet: Supernet, x: Tensor) -> Iterator[Tensor]:
    """Of the inputs and of all logits, in three draws."""
    for step in range(3):
        supernet.draw(0, step)
        leaf = x.clone().requires_grad_()
        with supernet.mode("relaxed"):
            output = supernet(leaf)
        output.square().sum().backward()
        yield from (output.detach(), leaf.grad.clone())  # type: ignore[union-attr]
        for parameter in supernet.arch_parameters():
            assert parameter.grad is not None
            yield parameter.grad.clone()
            parameter.grad = None


def test_gradients_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, followed = torch.randn(4, 3, 8, 8), list[int]()
    follow = recompute._Recipe.follow
    monkeypatch.setattr(recompute._Recipe, "follow", lambda recipe: [followed.append(1), follow(recipe)][1])
    found = []
    for least in (1, 1 << 30):
        monkeypatch.setattr(recompute, "LARGE", least)
        supernet = Supernet(network(), small_space())
        supernet.calibrate([x])
        supernet.relax(Sampled())
        found.append(list(gradients(supernet, x)))
    assert len(followed) == 3 * 4 * 2  # three steps, four layers, weight and input; none of the second
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_was_offered_is_let_go_and_made_once_more() -> None:
    made: list[int] = []
    x, w = torch.randn(5), torch.randn(5, requires_grad=True)

    def make() -> Tensor:
        made.append(1)
        return x.round()

    with Recomputation()():
        rounded = offer(make(), make)
        (rounded.view(5, 1)[1:] * w.view(5, 1)[1:]).sum().backward(retain_graph=True)
        out = (rounded * w).sum()
        gone = weakref.ref(rounded)
        del rounded
    gc.collect()
    assert gone() is None
    w.grad, made[:] = None, []
    out.backward()
    assert made == [1] and torch.equal(w.grad, x.round())  # type: ignore[arg-type]


def test_a_tensor_that_was_written_to_is_kept_as_it_is() -> None:
    x, w = torch.randn(5), torch.randn(5, requires_grad=True)
    with Recomputation()():
        rounded = offer(x.round(), x.round)
        rounded.add_(1.0)
        (rounded * w).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, x.round() + 1)


def test_the_address_of_a_tensor_that_is_gone_says_nothing_of_its_next_owner() -> None:
    w, memory = torch.randn(1000, requires_grad=True), np.ones(1000, dtype=np.float32)
    with Recomputation()():
        address = offer(torch.from_numpy(memory), lambda: torch.ones(1000)).data_ptr()
        memory[:] = 2
        other = torch.from_numpy(memory)
        assert other.data_ptr() == address
        (other * w).sum().backward()
    assert w.grad is not None and bool((w.grad == 2).all())


def test_hooks_are_left_out_while_nothing_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    recomputation = Recomputation()
    for offered, worthwhile in ((True, True), (False, False), (False, False), (True, True)):
        monkeypatch.setattr(recompute, "LARGE", 1 if offered else 100)
        with recomputation():
            offer(torch.ones(5), lambda: torch.ones(5))
        assert recomputation.worthwhile is worthwhile
