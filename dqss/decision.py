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


@dataclass(frozen=True)
class Frozen(Relaxation):
    """One option for good: the others are not looked at, and nothing is learned about them."""

    choice: int

    def weights(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.weights`; constant, so that no gradient reaches the logits."""
        hard = torch.zeros_like(logits, requires_grad=False)
        hard[self.choice] = 1.0
        return hard

    def place(self, logits: Tensor, noise: Tensor) -> int:
        """See :meth:`Relaxation.place`."""
        return self.choice


def _largest(values: Tensor) -> int:
    return int(values.detach().argmax())


class Decision(KeepsPrecision):
    """A named choice among K options with one architecture logit each.

    Options may turn out to be *alike*: two percentiles of nine values are the same number. What is
    learned and said about such options is about the outcome that they share.

    Args:
        name: unique in a supernet; what reports and strategies call it.
        options: what is chosen among; any hashable descriptions.

    Attributes:
        outcome: ``[K]`` int64, the number of the outcome that each option leads to.
        outcomes: how many different ones there are.
    """

    logits: nn.Parameter
    noise: Tensor
    outcome: Tensor

    def __init__(self, name: str, options: Sequence[Hashable]) -> None:
        super().__init__()
        if not options:
            raise ValueError(f"decision {name!r} has no options")
        self.name = name
        self.options = tuple(options)
        self.logits = nn.Parameter(torch.zeros(len(self.options), dtype=torch.float32))
        self.register_buffer("noise", torch.zeros(len(self.options)), persistent=False)
        self.register_buffer("outcome", torch.arange(len(self.options)), persistent=False)
        self.outcomes = len(self.options)
        self.relaxation: Relaxation = Softmax()
        self.assigned: int | None = None

    def weights(self) -> Tensor:
        """Mixture weights ``[K]`` of this forward pass, fp32 also under autocast."""
        return self.relaxation.weights(self.logits.float(), self.noise.float())

    def draw(self, generator: torch.Generator) -> None:
        """Draw this step's Gumbel noise from ``generator`` (on the CPU, so that devices agree)."""
        uniform = torch.rand(len(self.options), generator=generator).clamp_(1e-20, 1 - 1e-7)
        self.noise.copy_(-torch.log(-torch.log(uniform)))

    def recognize(self, outcome: Sequence[Hashable]) -> None:
        """Say which options lead to the same outcome: those with equal keys, in the order of options."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(outcome))}
        self.outcome.copy_(torch.tensor([numbers[key] for key in outcome]))
        self.outcomes = len(numbers)

    @torch.no_grad()
    def set_outcomes(self, logits: Tensor) -> None:
        """Set the logits so that ``softmax(logits)`` is the distribution of the outcomes.

        Options that are alike share the probability of their outcome.

        Args:
            logits: ``[C]``, one for each outcome.
        """
        share = self._by_outcome(torch.ones_like(self.logits)).log().to(logits)
        self.logits.copy_((logits - share)[self.outcome])

    @property
    def frozen(self) -> bool:
        """Whether one option is used alone, so that logits stay as they are."""
        return isinstance(self.relaxation, Frozen)

    @property
    def choice(self) -> int:
        """The option assigned or frozen, if there is one, otherwise the first of the largest logits."""
        if self.assigned is not None:
            return self.assigned
        if isinstance(self.relaxation, Frozen):
            return self.relaxation.choice
        return int(self.logits.detach().argmax())

    def place(self) -> int | None:
        """The only option with a weight in this forward pass; None where several have one."""
        return self.relaxation.place(self.logits.float(), self.noise.float())

    def probabilities(self) -> list[float]:
        """``softmax(logits)``, without relaxation or noise; options that are alike share theirs."""
        shared = self._by_outcome(torch.softmax(self.logits.detach().double(), dim=0))
        return cast("list[float]", shared[self.outcome].tolist())

    def entropy(self) -> Tensor:
        """Entropy of the outcome in nats, differentiable."""
        return entropies(outcome_probabilities([self]))[0]

    def margin(self) -> float:
        """Probability of the best outcome minus that of the second best; 1 where there is but one."""
        p = self._by_outcome(torch.softmax(self.logits.detach().double(), dim=0))
        ordered = sorted(p.tolist(), reverse=True)
        return float(ordered[0] - ordered[1]) if len(ordered) > 1 else 1.0

    def _by_outcome(self, values: Tensor) -> Tensor:
        """Sums of ``[K]`` over the options of each outcome."""
        return values.new_zeros(self.outcomes).index_add(0, self.outcome, values)

    def extra_repr(self) -> str:
        """Name and number of options, for ``print(supernet)``."""
        return f"{self.name!r}, options={len(self.options)}"


def outcome_probabilities(decisions: Sequence[Decision]) -> list[Tensor]:
    """Probabilities of the outcomes of many decisions at once, fp32, differentiable unless frozen.

    Returns:
        A tensor ``[D, K]`` for each number of options K; zero where a decision has fewer outcomes.
    """
    groups: dict[int, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(len(decision.options), []).append(decision)
    found = []
    for group in groups.values():
        logits = [d.logits.detach() if d.frozen else d.logits for d in group]
        p = torch.softmax(torch.stack(logits).float(), dim=-1)
        outcome = torch.stack([decision.outcome for decision in group])
        found.append(torch.zeros_like(p).scatter_add(1, outcome, p))
    return found


def entropies(probabilities: Sequence[Tensor]) -> Tensor:
    """Entropy in nats of each row, in one ``[D]``, differentiable: also where a probability is zero."""
    return torch.cat([-(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1) for p in probabilities])


def margins(probabilities: Sequence[Tensor]) -> Tensor:
    """Largest minus second largest probability of each row, in one ``[D]``; 1 where there is but one."""
    best = [p.topk(min(2, p.shape[-1]), dim=-1).values for p in probabilities]
    return torch.cat([top[:, 0] - top[:, 1] if top.shape[1] > 1 else top[:, 0] for top in best])
