"""Attention of other people: the applied network is the searched one, bit for bit, all products quantized."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import dqss
from dqss.apply import apply_strategy
from dqss.discretize import RefineSettings
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.prepare import prepare
from tests.support.nets import THREE, bundle_of, every_other, prepared_supernet, small_space

SIZE = 32
SPACE = small_space(4, THREE, products=True)
QUICK = PTQSettings(
    steps=2, batch_size=2, refine=RefineSettings(passes=2, alternatives=1), finalists=1, discrete_every=0
)


def vit(fused: bool) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_classes=5)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def swin() -> nn.Module:
    """Shifted windows, so a mask; at two scales."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=SIZE,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(1, 2),
        num_classes=5,
    )


def torchvision_vit() -> nn.Module:
    model = VisionTransformer(SIZE, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def torchvision_swin() -> nn.Module:
    return SwinTransformer(
        [4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=[4, 4],
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (lambda: vit(True), 2, 4),
    "vit, not fused": (lambda: vit(False), 4, 2),
    "swin": (swin, 8, 2),
    "torchvision vit": (torchvision_vit, 2, 4),
    "torchvision swin": (torchvision_swin, 8, 2),
}


@pytest.fixture(params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, int, int, Tensor]:
    """A network, how many products it has, their operands, and a batch."""
    make, products, operands = NETWORKS[request.param]
    return make().eval(), products, operands, torch.randn(2, 3, SIZE, SIZE)


@torch.no_grad()
def test_applied_is_the_discrete_supernet_bit_for_bit(case: tuple[nn.Module, int, int, Tensor]) -> None:
    model, products, operands, batch = case
    prepared, supernet = prepared_supernet(model, batch, SPACE)
    assert len(supernet.products) == products and not supernet.coverage.hidden_products
    assert all(len(list(p.operands())) == operands for p in supernet.products.values())
    with supernet.mode("float"):
        assert torch.equal(supernet(batch), prepare_alone(model, batch)(batch))
    for start in range(2):
        assignment = every_other(supernet, start)
        with supernet.assign(assignment):
            wanted = supernet(batch)
        applied = apply_strategy(model, bundle_of(prepared, supernet, assignment, batch))
        assert torch.equal(applied(batch), wanted)
        assert torch.equal(copy.deepcopy(applied)(batch), wanted)


def prepare_alone(model: nn.Module, batch: Tensor) -> nn.Module:
    """The canonical float network, frozen as the supernet is: torch chooses kernels by that."""
    return prepare(model, batch).model.requires_grad_(False)


def test_a_whole_search(tmp_path: Path) -> None:
    model, inputs = torchvision_vit().eval(), torch.randn(6, 3, SIZE, SIZE)
    result = search_ptq(model, inputs, SPACE, QUICK, run_dir=tmp_path, trainer={"accelerator": "cpu"})
    strategy = dqss.load(tmp_path).strategy
    assert set(strategy.products) == {
        f"encoder.layers.encoder_layer_{k}.self_attention.product0" for k in (0, 1)
    }
    assert "encoder.layers.encoder_layer_0.self_attention.q_proj" in strategy.layers
    exported = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(exported):
        assert torch.equal(apply_strategy(model, dqss.load(tmp_path))(inputs), result.supernet(inputs))
