"""DITN: counts, the unfolding, and the attention against its formula."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dqss.models.ditn import DITN, ChannelNorm, _InnerPatchAttention, fold, unfold
from dqss.models.super_resolution import NETWORKS, super_resolution


@pytest.mark.parametrize(
    ("name", "scale", "count"),
    [
        ("ditn_real", 2, 424_636),
        ("ditn_real", 3, 432_751),
        ("ditn_real", 4, 444_112),
        ("ditn_tiny", 2, 367_996),
    ],
)
def test_parameter_counts(name: str, scale: int, count: int) -> None:
    assert sum(p.numel() for p in NETWORKS[name](scale).parameters()) == count


def test_full_network_has_three_units() -> None:
    def count(name: str) -> int:
        return sum(p.numel() for p in NETWORKS[name](4).parameters())

    unit = sum(p.numel() for p in DITN(4, normalize=ChannelNorm).units.parameters())
    assert count("ditn") == count("ditn_tiny") + 2 * unit


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 16), (16, 40)])
def test_unfold_and_fold_are_inverse(height: int, width: int) -> None:
    x = torch.randn(2, 5, height, width)
    patches = unfold(x, 8)
    assert patches.shape == (2 * height * width // 64, 5, 8, 8)
    assert torch.equal(fold(patches, height, width), x)
    assert torch.equal(unfold(fold(patches, height, width), 8), patches)


def test_patches_are_cut_row_by_row() -> None:
    x = torch.arange(2 * 16 * 24).view(2, 1, 16, 24)
    patches = unfold(x, 8)
    for number, patch in enumerate(patches):
        image, place = divmod(number, 6)
        row, column = divmod(place, 3)
        assert torch.equal(patch, x[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8])


@torch.no_grad()
def test_attention_is_between_channels() -> None:
    attention = _InnerPatchAttention(6)
    attention.temperature.fill_(3.0)
    x = torch.randn(2, 6, 8, 8)
    for patch, found in zip(x, attention(x), strict=True):
        tokens = [attention.qkv(patch[:, i, j]) for i in range(8) for j in range(8)]
        q, k, v = torch.stack(tokens, dim=1).split(6)  # [6, 64] each
        scores = torch.tensor([[float(torch.cosine_similarity(a, b, dim=0)) for b in k] for a in q])
        mixed = ((3.0 * scores).softmax(dim=1) @ v).view(1, 6, 8, 8)
        torch.testing.assert_close(found, attention.project_out(mixed)[0], rtol=1e-4, atol=1e-5)


def test_channel_norm_normalizes_each_pixel() -> None:
    out = ChannelNorm(6)(torch.randn(2, 6, 3, 5) * 4 + 1)
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(2, 3, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=1, unbiased=False), torch.ones(2, 3, 5), rtol=1e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 16), (13, 9), (5, 5), (15, 8)])
def test_odd_sizes_are_padded_by_reflection_and_cropped(height: int, width: int) -> None:
    model = DITN(2, channels=4, layers=1).eval()
    x = torch.rand(1, 3, height, width)
    rows = [*range(height), *range(height - 2, -1, -1)][: -(-height // 8) * 8]
    columns = [*range(width), *range(width - 2, -1, -1)][: -(-width // 8) * 8]
    padded = x[:, :, rows][:, :, :, columns]
    found = model(x)
    assert found.shape == (1, 3, 2 * height, 2 * width)
    torch.testing.assert_close(found, model(padded)[:, :, : 2 * height, : 2 * width])


def test_spatial_attention_is_silent_at_first() -> None:
    layer = DITN(2, channels=4, layers=1).units[0].spatial[0]
    assert not layer.attn(torch.randn(1, 4, 16, 16)).any()


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Real variant's tensors under the names of the authors' code, in the order of theirs."""

    def layer(kind: str, attention: list[str], parts: list[str]) -> list[str]:
        feed_forward = [f"ffn.{name}.weight" for name in ("project_in", "dwconv", "project_out")]
        convolutions = [f"conv{number}.{name}" for number in (1, 2) for name in ("weight", "bias")]
        named = {"ffn": feed_forward, "conv": convolutions}
        return [f"{kind}.{name}" for name in attention + [name for part in parts for name in named[part]]]

    inner = ["attn.temperature", "attn.qkv.weight", "attn.qkv.bias", "attn.project_out.weight"]
    pairs = [f"{name}.{kind}" for name in ("DConvs.0", "DConvs.1", "DConvs.2", "proj_first.0", "proj_last.0")
             for kind in ("weight", "bias")]  # fmt: skip
    spatial = ["SDA.scale", *(f"SDA.{name}" for name in pairs)]
    names = ["sft.weight", "sft.bias"]
    for kind, attention, parts in (("ITLs", inner, ["conv", "ffn"]), ("SALs", spatial, ["ffn", "conv"])):
        for number in range(4):
            names += layer(f"UFONE.0.{kind}.{number}", attention, parts)
    names += ["conv_after_body.weight", "conv_after_body.bias", "upsample.0.weight", "upsample.0.bias"]
    return dict(zip(names, state.values(), strict=True))


def test_published_files_of_the_real_variant_load_by_order(tmp_path: Path) -> None:
    source = DITN(4)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    state = published_names(source.state_dict())
    # A few whose places show that the order of both is the same.
    assert torch.equal(state["UFONE.0.SALs.3.conv2.bias"], source.units[0].spatial[3].norm2.conv.bias)
    assert state["UFONE.0.ITLs.1.ffn.dwconv.weight"].shape == (240, 1, 3, 3)
    assert state["UFONE.0.SALs.0.SDA.DConvs.1.weight"].shape == (60, 1, 7, 7)
    torch.save(state, tmp_path / "real.pth")
    loaded = super_resolution("ditn_real", 4, tmp_path / "real.pth", checkpoint_mapping="order").module
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(x), source.eval()(x))
