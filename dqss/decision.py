"""A choice among options, relaxed so that gradient descent can make it.

Nothing here knows what the options are: quantizers today, block gates tomorrow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dqss.precision import KeepsPrecision, in_dtype

T = TypeVar("T")


class Relaxation(ABC):
    """How logits become the K mixture weights of one forward pass."""

    @abstractmethod
    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """What the gradient of the K weights reaches: they themselves, unless there is a :meth:`place`.

        Args:
            logits: ``[K]``.
            noise: K draws of the standard Gumbel distribution, fixed for the step.
        """

    def weights(self, logits: Tensor, noise: Tensor, place: int | None) -> Tensor:
        """Non-negative weights ``[K]`` that sum to one, differentiable in ``logits``.

        Args:
            logits, noise: as for :meth:`soft`.
            place: what :meth:`places` says of them.
        """
        soft = self.soft(logits, noise)
        return soft if place is None else _one_hot(soft, place)

    def places(self, logits: Tensor, noise: Tensor) -> Sequence[int | None]:
        """For each row of ``[D, K]`` the one option whose weight is 1 while the others' are 0.

        None for true mixtures. Where there is one, only that option need be evaluated on the way
        forward.
        """
        return [None] * len(logits)


@dataclass(frozen=True)
class Softmax(Relaxation):
    """``softmax(logits / temperature)``: every option contributes (DARTS, arXiv 1806.09055)."""

    temperature: float = 1.0

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.soft`; the noise is ignored."""
        return torch.softmax(logits / self.temperature, dim=0)


@dataclass(frozen=True)
class StraightThroughGumbel(Relaxation):
    """One sampled option forward, the soft sample's gradient backward (arXiv 1611.01144)."""

    temperature: float = 1.0

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.soft`."""
        return torch.softmax((logits + noise) / self.temperature, dim=0)

    def places(self, logits: Tensor, noise: Tensor) -> Sequence[int]:
        """See :meth:`Relaxation.places`."""
        return _largest(logits + noise)


@dataclass(frozen=True)
class OneHot(Relaxation):
    """The current choice as a one-hot vector whose gradient reaches the logits unchanged.

    Not for learning: ``dL/dlogits[k] - dL/dlogits[choice]`` is then the first-order estimate
    of what switching the decision to option k would do to the loss.
    """

    choice: int

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.soft`."""
        return logits

    def places(self, logits: Tensor, noise: Tensor) -> Sequence[int]:
        """See :meth:`Relaxation.places`."""
        return [self.choice] * len(logits)


@dataclass(frozen=True)
class Sampled(Relaxation):
    """One option drawn from ``softmax(logits)``; its gradient reaches the logits unchanged.

    The draw is the largest of logits plus Gumbel noise. For what the gradient is good for see
    :mod:`dqss.effects`.
    """

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.soft`."""
        return logits

    def places(self, logits: Tensor, noise: Tensor) -> Sequence[int]:
        """See :meth:`Relaxation.places`."""
        return _largest(logits + noise)


@dataclass(frozen=True)
class Frozen(Relaxation):
    """One option for good: the others are not looked at, and nothing is learned about them."""

    choice: int

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """See :meth:`Relaxation.soft`; constant, so that no gradient reaches the logits."""
        return logits.detach()

    def places(self, logits: Tensor, noise: Tensor) -> Sequence[int]:
        """See :meth:`Relaxation.places`."""
        return [self.choice] * len(logits)


def _largest(values: Tensor) -> list[int]:
    return cast("list[int]", values.detach().argmax(dim=-1).tolist())


class _OneHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, place: int) -> Tensor:
        hard = torch.zeros_like(soft)
        hard[place] = 1.0
        return hard

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def _one_hot(soft: Tensor, place: int | None) -> Tensor:
    """One at ``place``, in the gradient ``soft``."""
    hard: Tensor = _OneHot.apply(soft, place)
    return hard


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
        self._placed: tuple[object, int | None] = (None, None)

    def weights(self) -> Tensor:
        """Mixture weights ``[K]`` of this forward pass, fp32 also under autocast."""
        return self.relaxation.weights(self.logits.float(), self.noise.float(), self.place())

    def mixture(self) -> tuple[Tensor, int | None]:
        """For one forward pass: the weights and None, or what their gradient reaches and :meth:`place`.

        Where one option alone has a weight, nobody need write down the zeros of the others.
        """
        logits, noise = (in_dtype(part, torch.float32) for part in (self.logits, self.noise))
        return self.relaxation.soft(logits, noise), self.place()

    def relax(self, relaxation: Relaxation) -> None:
        """Use ``relaxation`` from now on."""
        # Not by the way of modules, which looks for parameters first.
        self.__dict__["relaxation"] = relaxation

    def draw(self, generator: torch.Generator) -> None:
        """Draw this step's Gumbel noise; see :func:`draw_all`."""
        draw_all([self], [generator])

    def recognize(self, outcome: Sequence[Hashable]) -> None:
        """Say which options lead to the same outcome: those with equal keys, in the order of options."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(outcome))}
        self.outcome.copy_(torch.tensor([numbers[key] for key in outcome]))
        self.outcomes = len(numbers)

    def set_outcomes(self, logits: Tensor) -> None:
        """Set the logits from ``[C]``, one for each outcome; see :func:`set_outcomes`."""
        set_outcomes([self], logits[None])

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
        if self._placed[0] != self._state:
            place_all([self])
        return self._placed[1]

    @property
    def _state(self) -> object:
        """Changes with all that :meth:`place` depends on: torch counts writes, but not those to ``.data``."""
        return self.relaxation, id(self.logits), self.logits._version, self.noise._version

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

    def mean_by_outcome(self, values: Tensor) -> Tensor:
        """Means of ``[K]`` over the options of each outcome, ``[C]``; both on the CPU."""
        outcome = self.outcome.cpu()
        sums = torch.zeros(self.outcomes, dtype=values.dtype).index_add(0, outcome, values)
        return sums / torch.bincount(outcome, minlength=self.outcomes)

    def extra_repr(self) -> str:
        """Name and number of options, for ``print(supernet)``."""
        return f"{self.name!r}, options={len(self.options)}"


@torch.no_grad()
def draw_all(decisions: Sequence[Decision], generators: Sequence[torch.Generator]) -> None:
    """Draw a step's Gumbel noise of each decision from its own generator.

    On the CPU, so that devices agree; all at once, since one decision is next to nothing to do.
    """
    for group in _by_size(list(zip(decisions, generators, strict=True)), lambda pair: pair[0]):
        size = len(group[0][0].options)
        uniform = torch.stack([torch.rand(size, generator=generator) for _, generator in group])
        noise = -torch.log(-torch.log(uniform.clamp_(1e-20, 1 - 1e-7)))
        rows = list(noise.to(group[0][0].noise.device))
        torch._foreach_copy_([decision.noise for decision, _ in group], rows)
    place_all(decisions)


@torch.no_grad()
def place_all(decisions: Sequence[Decision]) -> None:
    """Find out for each what :meth:`Decision.place` says: one by one, each would wait for the device."""
    for group in _by_size(decisions, lambda decision: decision):
        for relaxation in dict.fromkeys(decision.relaxation for decision in group):
            those = [decision for decision in group if decision.relaxation == relaxation]
            logits = torch.stack([decision.logits for decision in those]).float()
            noise = torch.stack([decision.noise for decision in those]).float()
            for decision, place in zip(those, relaxation.places(logits, noise), strict=True):
                # Not by the way of modules, which looks for parameters first.
                decision.__dict__["_placed"] = decision._state, place


@torch.no_grad()
def set_outcomes(decisions: Sequence[Decision], logits: Tensor) -> None:
    """Set the logits of options so that ``softmax(logits)`` is the distribution of the outcomes.

    Options that are alike share the probability of their outcome.

    Args:
        decisions: D of them, with equally many options and equally many outcomes C.
        logits: ``[D, C]``, one for each outcome.
    """
    outcome = torch.stack([decision.outcome for decision in decisions])
    members = torch.zeros_like(logits).scatter_add(1, outcome, torch.ones_like(outcome, dtype=logits.dtype))
    rows = (logits - members.log()).gather(1, outcome)
    torch._foreach_copy_([decision.logits for decision in decisions], list(rows))


def _by_size(things: Sequence[T], of: Callable[[T], Decision]) -> list[list[T]]:
    """Groups with equally many options."""
    groups: dict[int, list[T]] = {}
    for thing in things:
        groups.setdefault(len(of(thing).options), []).append(thing)
    return list(groups.values())


def alike(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """Decisions with equally many options and outcomes together: each group is one stacked tensor."""
    groups: dict[tuple[int, int], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((len(decision.options), decision.outcomes), []).append(decision)
    return list(groups.values())


def outcome_probabilities(decisions: Sequence[Decision]) -> list[Tensor]:
    """Probabilities of the outcomes of many decisions at once, fp32, differentiable unless frozen.

    Returns:
        A tensor ``[D, K]`` for each number of options K; zero where a decision has fewer outcomes.
    """
    found = []
    for group in _by_size(decisions, lambda decision: decision):
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
