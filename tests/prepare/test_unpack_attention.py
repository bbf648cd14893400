"""Attention taken apart computes what torch's computes, and is rebuilt from the recipe."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqss.prepare import UnpackedAttention, prepare

WIDTH, HEADS = 8, 2


@pytest.fixture(params=[True, False], ids=["fast path", "plain"], autouse=True)
def _fast_path(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def drawn(module: nn.Module) -> nn.Module:
    """No bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.eval()


MASK = torch.tensor([[False, True, False, False], [False] * 4, [True, False, True, False]])
PADDING = torch.tensor([[False, False, False, True], [False] * 4])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "mask": {"attn_mask": MASK},
    "mask, without weights": {"attn_mask": MASK, "need_weights": False},
    "added mask": {"attn_mask": torch.randn(3, 4), "need_weights": False},
    "mask for each head": {"attn_mask": torch.randn(2 * HEADS, 3, 4), "need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, without weights": {"key_padding_mask": PADDING, "need_weights": False},
    "both": {"key_padding_mask": PADDING, "attn_mask": MASK, "need_weights": False},
    "both, with weights": {"key_padding_mask": PADDING, "attn_mask": MASK},
}


@torch.no_grad()
@pytest.mark.parametrize("arguments", list(ARGUMENTS.values()), ids=list(ARGUMENTS))
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 5, "batch_first": True}],
    ids=["batch second", "batch first", "no bias", "other widths"],
)
def test_every_way_of_calling(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    packed = drawn(nn.MultiheadAttention(WIDTH, HEADS, **options))
    assert isinstance(packed, nn.MultiheadAttention)
    widths = WIDTH, packed.kdim, packed.vdim
    inputs = [torch.randn(2, size, width) for size, width in zip((3, 4, 4), widths, strict=True)]
    if not packed.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    compare(packed, inputs, arguments)


def compare(packed: nn.MultiheadAttention, inputs: list[Tensor], arguments: dict[str, Any]) -> None:
    wanted, weights = packed(*inputs, **arguments)
    found, found_weights = UnpackedAttention(packed)(*inputs, **arguments)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (weights is None) == (found_weights is None)
    if weights is not None:
        torch.testing.assert_close(found_weights, weights, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("need_weights", [True, False])
def test_one_sequence_and_a_causal_hint(need_weights: bool) -> None:
    packed = drawn(nn.MultiheadAttention(WIDTH, HEADS))
    assert isinstance(packed, nn.MultiheadAttention)
    x = torch.randn(4, WIDTH)
    compare(packed, [x, x, x], {"need_weights": need_weights})
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    compare(packed, [x, x, x], {"need_weights": need_weights, "attn_mask": mask, "is_causal": True})
    with pytest.raises(ValueError, match="attn_mask"):
        UnpackedAttention(packed)(x, x, x, is_causal=True)


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_padding_calls_its_projections(norm_first: bool) -> None:
    model = encoder(norm_first)
    batch = {"src": torch.randn(2, 4, WIDTH), "src_key_padding_mask": PADDING}
    prepared = prepare(model, batch)
    assert prepared.recipe == ["unpack_attention"] and not prepared.notes
    called = []
    for layer in prepared.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            hook = getattr(layer.self_attn, name).register_forward_hook
            hook(lambda *_, name=name: called.append(name))
    found, wanted = prepared.model(**batch), model(**batch)
    assert called == ["q_proj", "k_proj", "v_proj", "out_proj"] * 2
    torch.testing.assert_close(found[~PADDING], wanted[~PADDING], rtol=1e-5, atol=1e-5)
    replayed = prepare(model, {"src": torch.zeros(1, 2, WIDTH)}, recipe=prepared.recipe)
    assert torch.equal(replayed.model(**batch), prepared.model(**batch))
    assert set(prepared.fingerprints) == set(model.state_dict())


@torch.no_grad()
def test_a_decoder() -> None:
    model = drawn(nn.TransformerDecoderLayer(WIDTH, HEADS, 16))
    batch = torch.randn(3, 2, WIDTH), torch.randn(4, 2, WIDTH)
    prepared = prepare(model, batch)
    assert isinstance(prepared.model.multihead_attn, UnpackedAttention)
    torch.testing.assert_close(prepared.model(*batch), model(*batch), rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """One attention in two places, one that nothing calls, and kinds that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS)
        self.again = self.first
        self.idle = nn.MultiheadAttention(WIDTH, HEADS)
        self.biased = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
        self.zeroed = nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        for attention in (self.first, self.again, self.biased, self.zeroed):
            x = x + attention(x, x, x)[0]
        return x


@torch.no_grad()
def test_what_cannot_be_unpacked_is_left_by_name() -> None:
    model, x = drawn(Several()), torch.randn(3, 2, WIDTH)
    prepared = prepare(model, x)
    assert prepared.recipe == ["unpack_attention -idle -biased -zeroed"]
    assert prepared.notes == ["attention with its projections packed, weights in float: idle, biased, zeroed"]
    assert prepared.model.again is prepared.model.first
    assert isinstance(prepared.model.first, UnpackedAttention)
    assert type(prepared.model.biased) is type(prepared.model.zeroed) is nn.MultiheadAttention
    torch.testing.assert_close(prepared.model(x), model(x), rtol=1e-5, atol=1e-5)
    replayed = prepare(model, x, recipe=prepared.recipe).model
    assert torch.equal(replayed(x), prepared.model(x)) and type(replayed.idle) is nn.MultiheadAttention


class Reads(nn.Module):
    """Looks into its attention, so that nothing else can stand in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + self.attention.in_proj_weight.mean()


@torch.no_grad()
def test_a_model_that_reads_the_packed_weight_keeps_it() -> None:
    model, x = drawn(Reads()), torch.randn(3, 2, WIDTH)
    prepared = prepare(model, x)
    assert prepared.recipe == [] and "attention" in prepared.notes[0]
    assert type(prepared.model.attention) is nn.MultiheadAttention
    assert torch.equal(prepared.model(x), model(x))
