"""One optimizer for weights, quantizers and logits: each kind in steps of its own sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dqss.lit.mean_field import MeanField

RELATIVE = "relative"


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``relative=True`` move each value by a share of itself.

    Adam's steps are of the size of the learning rate, whatever the gradient's. The steps and clips of
    quantizers differ from one another by orders of magnitude, from a weight's step of 0.01 to an
    activation's clip of 10: one rate fits all only as a share. Values near zero move as if they had a
    tenth of the mean size of their tensor. Our reading; the papers of the algorithms use SGD, each
    with rates of its own.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of AdamW."""
        relative = [p for group in self.param_groups if group.get(RELATIVE) for p in group["params"]]
        before = [p.detach().clone() for p in relative]
        loss = super().step(closure)
        with torch.no_grad():
            for parameter, old in zip(relative, before, strict=True):
                parameter.copy_(old + (parameter - old) * _size(old))
        return loss


class WithMeanField(torch.optim.Optimizer):
    """An optimizer whose steps end with one of :class:`dqss.lit.mean_field.MeanField`, for the logits.

    To Lightning it is one optimizer, with the parameter groups of both.

    Args:
        others: moves everything else.
        mean_field: sets the logits.
    """

    def __init__(self, others: torch.optim.Optimizer, mean_field: MeanField) -> None:
        mean_field.param_groups[0].setdefault("lr", 0.0)  # schedules of rates want one; it is not used
        groups: Sequence[dict[str, Any]] = [*others.param_groups, *mean_field.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.others, self.mean_field = others, mean_field
        self.param_groups = list(groups)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both, for one pass back."""
        loss = self.others.step(closure)
        self.mean_field.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both."""
        self.others.zero_grad(set_to_none)
        self.mean_field.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Of both, apart."""
        return {"others": self.others.state_dict(), "mean_field": self.mean_field.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.others.load_state_dict(state_dict["others"])
        self.mean_field.load_state_dict(state_dict["mean_field"])
        self.param_groups = [*self.others.param_groups, *self.mean_field.param_groups]


def _size(values: Tensor) -> Tensor:
    magnitude = values.abs()
    return torch.maximum(magnitude, 0.1 * magnitude.mean())
