"""The supernet of QAT: weights, quantizer parameters and logits learn together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dqss.attach import original_weight
from dqss.decision import Frozen
from dqss.errors import NonFiniteError, SearchSpaceError
from dqss.space import SearchSpace
from dqss.supernet import Assignment, Supernet
from dqss.trained import TrainedActivation, TrainedWeight


@dataclass(frozen=True)
class Learnable:
    """The three kinds of parameters; disjoint, and exhaustive for those that require gradients."""

    weights: list[nn.Parameter]
    quantizers: list[nn.Parameter]
    logits: list[nn.Parameter]


class TrainableSupernet(Supernet):
    """Decisions on a network that learns (arXiv 2404.08010: all from one loss in one pass).

    Weights are quantized anew in every pass, by candidates whose scales and clips learn. Batch norms
    and dropout follow ``train()`` and ``eval()`` as in any network.

    Args:
        model: a prepared network; it is changed in place.
        space: which layers, which candidates.
        compensate: see :class:`dqss.trained._Learning`.

    Raises:
        SearchSpaceError: where products of two activations, or points, are to be searched.
    """

    weight_type: ClassVar[type[TrainedWeight]] = TrainedWeight
    activation_type: ClassVar[type[TrainedActivation]] = TrainedActivation
    trains: ClassVar[bool] = True

    def __init__(self, model: nn.Module, space: SearchSpace, compensate: bool = True) -> None:
        if space.products:
            raise SearchSpaceError(
                "products=true: products of two activations are searched by method=ptq only; "
                "set search_space.products=false"
            )
        if space.points:
            raise SearchSpaceError("points of quantization are searched by method=ptq only")
        self._names = list(model.state_dict())
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        # A network in which nothing requires gradients was frozen for inference, not for good.
        learning = [p for p in parameters if p.requires_grad] or parameters
        super().__init__(model, space)
        for parameter in learning:
            parameter.requires_grad_(True)
        for quantizer in self.quantizers():
            quantizer.requires_grad_(True)
            quantizer.compensate = compensate  # type: ignore[assignment]

    def learnable(self) -> Learnable:
        """What an optimizer moves, by kind."""
        logits = self.arch_parameters()
        own = {id(p): p for q in self.quantizers() for p in q.candidates.parameters()}
        known = {id(p) for p in logits} | set(own)
        weights = [p for p in self.model.parameters() if id(p) not in known]
        groups = ([p for p in group if p.requires_grad] for group in (weights, own.values(), logits))
        return Learnable(*groups)

    def fix(self, assignment: Assignment) -> None:
        """Use one option of each decision for good; the others, and the logits, learn no more."""
        for quantizer in self.quantizers():
            decision = quantizer.decision
            chosen = assignment[decision.name]
            decision.relaxation = Frozen(chosen)
            decision.logits.requires_grad_(False)
            for k, candidate in enumerate(quantizer.candidates):
                candidate.requires_grad_(k == chosen)

    @torch.no_grad()
    def constrain(self) -> None:
        """After a step of the optimizer: scales and clips stay valid.

        Raises:
            NonFiniteError: naming the decision whose candidate is lost.
        """
        for quantizer in self.quantizers():
            broken = quantizer.constrain()  # type: ignore[operator]
            if broken:
                raise NonFiniteError(
                    f"the scale of {broken[0]} in {quantizer.decision.name!r} is not finite any more; lower "
                    "method.learning_rate, or leave this candidate out"
                )

    def network_state(self) -> dict[str, Tensor]:
        """The network's own tensors, by the names that they have without decisions on it."""
        found = {}
        for name in self._names:
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            tensor = original_weight(owner) if leaf == "weight" else getattr(owner, leaf)
            found[name] = tensor.detach()
        return found

    @torch.no_grad()
    def load_network_state(self, state: dict[str, Tensor]) -> None:
        """Undo :meth:`network_state`: the same tensors, with other values."""
        for name, tensor in self.network_state().items():
            tensor.copy_(state[name])
