"""Small networks of every shape that a supernet must cope with, each with a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.nets import cnn, images


class Convolutions(nn.Module):
    """Every kind of convolution, grouped and not."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2, padding=1), nn.ReLU())
        self.up1 = nn.ConvTranspose1d(4, 2, 2, stride=2)
        self.plane = nn.Conv2d(2, 4, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.volume = nn.Conv3d(1, 2, 2)
        self.up3 = nn.ConvTranspose3d(2, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up1(self.line(x)).reshape(len(x), 2, 2, -1)
        y = self.up2(self.plane(y))
        return self.up3(self.volume(y.unsqueeze(1))).mean(dim=(2, 3))


class Doubling(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(2 * x, self.weight, self.bias)


class Twice(nn.Module):
    """A layer used twice, one used only by large inputs, one used never."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Doubling(6, 6)
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(torch.relu(self.shared(x)))
        if x.abs().max() > 50:
            x = self.rare(x)
        return self.head(x)


class ReadsWeights(nn.Module):
    """Weights read by the model itself, the way some attention blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.qkv.weight, self.qkv.bias))


class Tied(nn.Module):
    """An embedding tied to the head, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.second(torch.relu(self.first(x))))


@dataclass
class Answer:
    """A structured output."""

    aux: Tensor
    logits: Tensor


class Structured(nn.Module):
    """Keyword inputs, integers among them; a dictionary or a dataclass comes out."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.a, self.b, self.as_dict = nn.Linear(6, 6), nn.Linear(6, 3), as_dict

    def forward(self, x: Tensor, index: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> Any:
        h = self.a(input=x)[:, index[0] :] * scale
        h = nn.functional.pad(h, (int(index[0]), 0))
        y = self.b(h if extra is None else h + extra)
        return {"aux": h, "logits": y} if self.as_dict else Answer(h, y)


class Attention(nn.Module):
    """Attention alone: its output projection is read, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.Sequential(layer, nn.Linear(8, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "cnn": (cnn, lambda: images(4)),
    "convolutions": (Convolutions, lambda: torch.randn(3, 4, 6)),
    "used twice": (Twice, lambda: torch.randn(5, 6)),
    "weight read": (ReadsWeights, lambda: (torch.randn(5, 6),)),
    "tied": (Tied, lambda: torch.randint(0, 11, (3, 5))),
    "structured dict": (
        lambda: Structured(True),
        lambda: {"x": torch.randn(4, 6), "index": torch.tensor([1]), "scale": 2.0},
    ),
    "structured dataclass": (
        lambda: Structured(False),
        lambda: (torch.randn(4, 6), torch.tensor([2]), 1.0, torch.randn(4, 6)),
    ),
    "attention": (Attention, lambda: torch.randn(2, 5, 8)),
    "encoder": (encoder, lambda: torch.randn(2, 5, 8)),
    "encoder, norms first": (lambda: encoder(True), lambda: torch.randn(2, 5, 8)),
}
