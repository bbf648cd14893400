"""Activations computed anew on the way back: the same gradients to the bit, and less that is kept."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dqss.decision import Frozen, Relaxation, Sampled, Softmax, StraightThroughGumbel
from dqss.errors import UserError
from dqss.lit.schedules import MeanFieldSchedule
from dqss.lit.settings import PTQSettings
from dqss.prepare import prepare
from dqss.recompute import blocks, recomputing
from dqss.supernet import Supernet
from tests.support.nets import THREE, calibrated, cnn, images, output, small_space
from tests.support.searches import fit, search

PRODUCTS = small_space(4, THREE, products=True)


class Residual(nn.Module):
    """With an argument whose name is also one of torch's checkpoint function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.Dropout(0.5)
        )

    def forward(self, x: Tensor, *, debug: float = 1.0) -> Tensor:
        return x + debug * self.body(x)


class Deep(nn.Module):
    """Blocks in a list and in a sequence, one alone, one that is used twice."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.listed = nn.ModuleList(Residual(4) for _ in range(depth))
        self.row = nn.Sequential(Residual(4), nn.ReLU(), Residual(4))
        self.alone = Residual(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.listed:
            x = block(x, debug=0.5)
        return self.head(self.alone(self.alone(self.row(x))).mean((2, 3)))


def vit(fused: bool = True) -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=5
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.eval()


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_heads=(1, 2), num_classes=5, **sizes).eval()


def mobilenet() -> nn.Module:
    """With statistics of its own inputs, so that activations do not fade."""
    model = timm.create_model("mobilenetv2_035", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(pictures())
    return model.eval()


def pictures() -> Tensor:
    return images(2, 3, 32, 32)


AUTO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "deep": (lambda: Deep().eval(), lambda: images(3)),
    "vit": (vit, pictures),
    "vit, matmul": (lambda: vit(fused=False), pictures),
    "swin": (swin, pictures),
    "mobilenet": (mobilenet, pictures),
}


def step(supernet: Supernet, batch: Any) -> dict[str, Tensor]:
    """Forward in relaxed mode, backward once the mode is another, as the search does it."""
    for decision in supernet.decisions.values():
        decision.logits.grad = None
    with supernet.mode("relaxed"):
        found = output(supernet, batch)
    found.square().sum().backward()
    gradients = {n: d.logits.grad for n, d in supernet.decisions.items() if d.logits.grad is not None}
    return {"output": found.detach(), **gradients}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("relaxation", [Sampled(), Softmax(), StraightThroughGumbel(0.7)], ids=repr)
def test_gradients_are_the_same_to_the_bit(name: str, relaxation: Relaxation) -> None:
    make, batches = AUTO[name]
    batch = batches()
    supernet = Supernet(prepare(make(), batch).model, PRODUCTS)
    supernet.calibrate([batch])
    supernet.relax(relaxation)
    supernet.draw(seed=0, step=1)
    for decision in list(supernet.decisions.values())[::5]:
        decision.relaxation = Frozen(1)
    wanted = step(supernet, batch)
    assert wanted["output"].any()
    assert sum(bool(found.any()) for found in wanted.values()) > len(supernet.decisions) / 2
    with recomputing(supernet, ("auto",)):
        assert same(step(supernet, batch), wanted)
        supernet.draw(seed=0, step=2)
        for parameter in supernet.arch_parameters():
            parameter.data[0] += 0.5
        other = step(supernet, batch)
    assert same(step(supernet, batch), other) and not same(other, wanted)
    with recomputing(supernet, ("*",)):
        assert same(step(supernet, batch), other)


def test_auto_finds_the_blocks_that_repeat() -> None:
    found = {name: list(blocks(Supernet(make(), PRODUCTS), ("auto",))) for name, (make, _) in AUTO.items()}
    assert found["deep"] == ["listed.0", "listed.1", "listed.2", "row.0", "row.2"]
    assert found["vit"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["swin"] == ["layers.0", "layers.1"]
    assert (
        found["mobilenet"][:3] == ["blocks.1.0", "blocks.1.1", "blocks.2.0"] and len(found["mobilenet"]) == 16
    )


def test_patterns_mean_the_outermost_modules_with_layers_inside() -> None:
    supernet = Supernet(Deep(), small_space(skip=["row.*"]))
    for patterns, wanted in (
        (("alone",), ["alone"]),
        (("*.body", "listed.1"), ["listed.0.body", "listed.1", "listed.2.body", "alone.body"]),
        (("*",), ["listed.0", "listed.1", "listed.2", "alone"]),
        (("auto", "alone.body"), ["listed.0", "listed.1", "listed.2", "alone.body"]),
        ((), []),
    ):
        assert list(blocks(supernet, patterns)) == wanted
    for pattern, message in (
        ("alon", r"no module with layers under search inside matches 'alon' \(did you mean 'alone'\?\)"),
        ("listed", "no module with layers"),  # a list is never called
        ("row.0", "no module with layers"),  # stays in float
        ("stem", "no module with layers"),  # has nothing but its own weight to keep
    ):
        with pytest.raises(UserError, match=message):
            blocks(supernet, (pattern,))


def test_a_network_that_repeats_nothing_is_told_so() -> None:
    with pytest.raises(UserError, match=r"recompute=auto: the network repeats no block.*such as \[part\]"):
        blocks(Supernet(nn.ModuleDict({"part": cnn()}), small_space()), ("auto",))
    with pytest.raises(UserError, match=r"recompute=auto: the network repeats no block"):
        blocks(Supernet(cnn(), small_space()), ("auto",))


@contextmanager
def counting_what_is_kept() -> Iterator[list[int]]:
    """Bytes of all tensors saved for the way back, each once."""
    seen: dict[int, int] = {}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def test_a_block_keeps_its_input_alone() -> None:
    kept: dict[tuple[int, bool], int] = {}
    batch = images(8, 3, 16, 16)
    for depth in (2, 6):
        supernet = calibrated(Deep(depth).eval(), batch)
        with supernet.mode("relaxed"):
            output(supernet, batch)  # whose tensors turn out to be too small to be made again
        for patterns in ((), ("listed.*",)):
            with supernet.mode("relaxed"), recomputing(supernet, patterns), counting_what_is_kept() as total:
                output(supernet, batch)
            kept[depth, bool(patterns)] = total[0]
    block_input = 8 * 4 * 16 * 16 * 4  # bytes
    assert kept[6, True] - kept[2, True] == 4 * block_input
    assert kept[6, False] - kept[2, False] > 4 * 4 * block_input


def test_it_is_taken_away_again() -> None:
    supernet, batch = calibrated(Deep().eval(), images(3)), images(3)
    before = {name: set(vars(module)) for name, module in supernet.named_modules()}
    calls = [quantizer.calls for quantizer in supernet.quantizers()]
    patched = supernet.model.alone.body
    patched.forward = own = patched.forward
    with recomputing(supernet, ("auto", "alone.body")):
        assert "forward" in vars(supernet.model.row[0])
        twin = step(supernet, batch)
    with pytest.raises(RuntimeError), recomputing(supernet, ("auto",)):
        output(supernet, images(2, 5, 6, 6))
    assert patched.forward is own
    del patched.forward
    assert {name: set(vars(module)) for name, module in supernet.named_modules()} == before
    assert all(now > then for now, then in zip((q.calls for q in supernet.quantizers()), calls, strict=True))
    assert same(step(copy.deepcopy(supernet), batch), twin)


def test_without_gradients_blocks_run_as_they_are() -> None:
    supernet, batch = calibrated(Deep().eval(), images(3)), images(3)
    with torch.no_grad(), supernet.mode("relaxed"):
        wanted = output(supernet, batch)
        with recomputing(supernet, ("auto",)):
            assert torch.equal(output(supernet, batch), wanted)
    runs: list[int] = []
    supernet.model.row[0].body.register_forward_pre_hook(lambda *_: runs.append(1))
    with recomputing(supernet, ("auto",)):
        with torch.no_grad():
            output(supernet, batch)
        assert len(runs) == 1
        step(supernet, batch)
        assert len(runs) == 3  # forward, and anew on the way back


def test_a_search_does_not_notice() -> None:
    model = Deep().eval()
    plain = fit(search(MeanFieldSchedule(), steps=6, model=model))
    module = search(MeanFieldSchedule(), steps=6, model=model)
    with recomputing(module.supernet, ("auto",)):
        fit(module)
    for a, b in zip(plain.supernet.arch_parameters(), module.supernet.arch_parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["soft_loss"] for row in plain.history] == [row["soft_loss"] for row in module.history]


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.recompute=\[\]: name modules, or write auto, or null"):
        PTQSettings(recompute=[])
    assert PTQSettings(recompute="auto").recompute == ("auto",)
