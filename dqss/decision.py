"""A choice among options, relaxed so that gradient descent can make it.

Nothing here knows what the options are: quantizers today, block gates tomorrow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dqss.precision import KeepsPrecision


class Relaxation(ABC):
    """How logits become the K mixture weights of one forward pass."""

    @abstractmethod
    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Non-negative weights ``[K]`` that sum to one, differentiable in ``logits``.

        ``noise`` holds K draws of the standard Gumbel distribution, fixed for the step.
        """

    def place(self, logits: Tensor, noise: Tensor) -> int | None:
        """The one option whose weight is 1 while the others' are 0; None for true mixtures.

        Of such weights only that option need be evaluated on the way forward.
        """
        return None


@dataclass(frozen=True)
class Softmax(Relaxation):
    """``softmax(logits / temperature)``: every option contributes (DARTS, arXiv 1806.09055)."""

    temperature: float = 1.0

    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.weights`; the noise is ignored."""
        return torch.softmax(logits / self.temperature, dim=0)


@dataclass(frozen=True)
class StraightThroughGumbel(Relaxation):
    """One sampled option forward, the soft sample's gradient backward (arXiv 1611.01144)."""

    temperature: float = 1.0

    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.weights`; exactly one-hot in value."""
        soft = torch.softmax((logits + noise) / self.temperature, dim=0)
        hard = torch.zeros_like(soft)
        hard[self.place(logits, noise)] = 1.0
        return hard + (soft - soft.detach())

    def place(self, logits: Tensor, noise: Tensor) -> int:
        """See :meth:`Relaxation.place`."""
        return _largest(logits + noise)


@dataclass(frozen=True)
class OneHot(Relaxation):
    """The current choice as a one-hot vector whose gradient reaches the logits unchanged.

    Not for learning: ``dL/dlogits[k] - dL/dlogits[choice]`` is then the first-order estimate
    of what switching the decision to option k would do to the loss.
    """

    choice: int

    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.weights`."""
        hard = torch.zeros_like(logits)
        hard[self.choice] = 1.0
        return hard + (logits - logits.detach())

    def place(self, logits: Tensor, noise: Tensor) -> int:
        """See :meth:`Relaxation.place`."""
        return self.choice


@dataclass(frozen=True)
class Sampled(Relaxation):
    """One option drawn from ``softmax(logits)``; its gradient reaches the logits unchanged.

    The draw is the largest of logits plus Gumbel noise. For what the gradient is good for see
    :mod:`dqss.effects`.
    """

    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.weights`; exactly one-hot in value."""
        return OneHot(self.place(logits, noise)).weights(logits, noise)

    def place(self, logits: Tensor, noise: Tensor) -> int:
        """See :meth:`Relaxation.place`."""
        return _largest(logits + noise)


def _largest(values: Tensor) -> int:
    return int(values.detach().argmax())


class Decision(KeepsPrecision):
    """A named choice among K options with one architecture logit each.

    Args:
        name: unique in a supernet; what reports and strategies call it.
        options: what is chosen among; any hashable descriptions.
    """

    logits: nn.Parameter
    noise: Tensor

    def __init__(self, name: str, options: Sequence[Hashable]) -> None:
        super().__init__()
        if not options:
            raise ValueError(f"decision {name!r} has no options")
        self.name = name
        self.options = tuple(options)
        self.logits = nn.Parameter(torch.zeros(len(self.options), dtype=torch.float32))
        self.register_buffer("noise", torch.zeros(len(self.options)), persistent=False)
        self.relaxation: Relaxation = Softmax()
        self.assigned: int | None = None

    def weights(self) -> Tensor:
        """Mixture weights ``[K]`` of this forward pass, fp32 also under autocast."""
        return self.relaxation.weights(self.logits.float(), self.noise.float())

    def draw(self, generator: torch.Generator) -> None:
        """Draw this step's Gumbel noise from ``generator`` (on the CPU, so that devices agree)."""
        uniform = torch.rand(len(self.options), generator=generator).clamp_(1e-20, 1 - 1e-7)
        self.noise.copy_(-torch.log(-torch.log(uniform)))

    @property
    def choice(self) -> int:
        """The assigned option if there is one, otherwise the first of the largest logits."""
        if self.assigned is not None:
            return self.assigned
        return int(self.logits.detach().argmax())

    def place(self) -> int | None:
        """The only option with a weight in this forward pass; None where several have one."""
        return self.relaxation.place(self.logits.float(), self.noise.float())

    def probabilities(self) -> list[float]:
        """``softmax(logits)``, without relaxation or noise."""
        return cast("list[float]", torch.softmax(self.logits.detach().double(), dim=0).tolist())

    def entropy(self) -> Tensor:
        """Entropy of :meth:`probabilities` in nats, differentiable."""
        log_p = torch.log_softmax(self.logits.float(), dim=0)
        return -(log_p.exp() * log_p).sum()

    def margin(self) -> float:
        """Probability of the best option minus that of the second best; 1 where there is but one."""
        ordered = sorted(self.probabilities(), reverse=True)
        return ordered[0] - ordered[1] if len(ordered) > 1 else 1.0

    def extra_repr(self) -> str:
        """Name and number of options, for ``print(supernet)``."""
        return f"{self.name!r}, options={len(self.options)}"
