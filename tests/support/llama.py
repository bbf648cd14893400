"""A small llama in plain torch, read from llama2.c's file format, with its tokenizer.

The layout is that of the checkpoints of version 0: seven int32 (dim, hidden_dim, n_layers,
n_heads, n_kv_heads, vocab_size, seq_len), then fp32 tensors. A negative vocabulary size says that
the classifier has weights of its own; otherwise it shares those of the embedding.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNKNOWN, BEGIN = 0, 1
FIRST_BYTE = 3  # tokens 3..258 are the bytes


@dataclass(frozen=True)
class Config:
    """The header of the file."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on neighbouring pairs; ``[B, heads, T, size]``."""
    size = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal attention with fewer heads for keys and values than for queries."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.size = config.dim // config.heads
        kv = config.kv_heads * self.size
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv, bias=False)
        self.wv = nn.Linear(config.dim, kv, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated feed-forward net, each on a residual branch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.att_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attention = Attention(config)
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.att_norm(x))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """Tokens ``[B, T]`` int64 to logits ``[B, T, vocabulary]``; the head is tied to the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @classmethod
    def load(cls, path: Path) -> "Llama":
        """Read a checkpoint whose classifier is shared."""
        data = path.read_bytes()
        config = Config(*struct.unpack("7i", data[:28]))
        assert config.vocabulary > 0, "an untied checkpoint"
        values = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
        model, position = cls(config), 0
        with torch.no_grad():
            for parameter in model.in_file_order():
                parameter.copy_(values[position : position + parameter.numel()].view_as(parameter))
                position += parameter.numel()
        tables = config.positions * config.dim // config.heads  # cosines and sines, computed here instead
        assert len(values) == position + tables, "the file has another layout"
        return model.eval()

    def in_file_order(self) -> list[Tensor]:
        """The file holds each kind of tensor for all blocks before the next kind."""

        def each(name: str) -> list[Tensor]:
            return [block.get_parameter(name) for block in self.blocks]

        attention = [p for key in ("wq", "wk", "wv", "wo") for p in each(f"attention.{key}.weight")]
        feed_forward = [p for key in ("w1", "w2", "w3") for p in each(f"{key}.weight")]
        norms = each("att_norm.weight"), each("ffn_norm.weight")
        return [self.embedding.weight, *norms[0], *attention, *norms[1], *feed_forward, self.norm.weight]


class Tokenizer:
    """Byte-pair merges by score, as sentencepiece and llama2.c do them."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        data = path.read_bytes()
        self.pieces, self.scores, position = list[bytes](), list[float](), 4
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", data, position)
            position += 8
            self.pieces.append(data[position : position + length])
            self.scores.append(score)
            position += length
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Token ids, beginning with the mark of a text's begin."""
        tokens: list[int] = []
        for character in " " + text:
            piece = character.encode()
            found = self.ids.get(piece)
            tokens += [found] if found is not None else [byte + FIRST_BYTE for byte in piece]
        while True:
            merges = [
                (self.scores[merged], -position, merged)
                for position in range(len(tokens) - 1)
                if (merged := self.ids.get(self.pieces[tokens[position]] + self.pieces[tokens[position + 1]]))
            ]
            if not merges:
                return [BEGIN, *tokens]
            _, position, merged = max(merges)
            tokens[-position : -position + 2] = [merged]

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, without what the tokenizer itself put before it."""
        parts = []
        for token in tokens:
            is_byte = FIRST_BYTE <= token < FIRST_BYTE + 256
            parts.append(bytes([token - FIRST_BYTE]) if is_byte else self.pieces[token])
        return b"".join(parts[1:]).decode().removeprefix(" ")
