"""How far a quantized output is from the float network's, and what the search minimizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.calls import first_tensor
from dqss.errors import DataError

Reader = Callable[[Any], Tensor]
"""Picks the tensor that matters out of a model's (structured) output."""


class SearchLoss(Protocol):
    """A scalar to minimize; any callable of this form will do."""

    def __call__(self, output: Any, reference: Tensor, targets: Tensor | None) -> Tensor:
        """``output`` is the model's own; ``reference`` what the reader takes from the float one."""
        ...


class Distance(ABC):
    """A distance between outputs, one number a sample; its mean is also a label-free loss."""

    name: str

    def __init__(self, read: Reader = first_tensor) -> None:
        self.read = read

    @abstractmethod
    def per_sample(self, output: Tensor, reference: Tensor) -> Tensor:
        """``[N]`` from two outputs ``[N, ...]``."""

    def curvature_root(self, reference: Tensor, signs: Tensor) -> Tensor:
        """A random vector whose mean outer product is the distance's Hessian at ``reference``.

        Up to a constant factor. The identity unless a distance says otherwise: right for squared
        errors, and a stand-in for distances without a Hessian.

        Args:
            reference: output ``[N, ...]``.
            signs: independent random signs, like ``reference``.
        """
        return signs

    def curvature_scale(self, output: Tensor) -> float:
        """The factor on that mean outer product which makes it the Hessian of :meth:`per_sample`.

        Zero for distances without a Hessian, so that what is derived from it is left out.

        Args:
            output: ``[N, ...]``; only its shape counts.
        """
        return 0.0

    def softer(self) -> Distance | None:
        """A distance of the same kind to which more of the samples contribute; None where there is none."""
        return None

    def __call__(self, output: Any, reference: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean over samples; ``targets`` are not looked at."""
        return self.per_sample(self.read(output).float(), reference.float()).mean()


SOFT = 2.0
"""The temperature of the softer divergence."""


class KLDivergence(Distance):
    """KL(softmax(reference) || softmax(output)) over the last axis, in nats.

    Axes between the first and the last (positions of a language model) are averaged.

    Args:
        read: picks the logits out of a model's output.
        temperature: that all logits are divided by first (arXiv 1503.02531). Above 1 inputs count of which
            the network is sure: at 1 a few, of which it is not, make up nearly all.
    """

    name = "kl"

    def __init__(self, read: Reader = first_tensor, temperature: float = 1.0) -> None:
        super().__init__(read)
        self.temperature = temperature

    def per_sample(self, output: Tensor, reference: Tensor) -> Tensor:
        """See :meth:`Distance.per_sample`; outputs are logits ``[N, ..., classes]``."""
        wanted = torch.log_softmax(reference / self.temperature, dim=-1)
        kl = (wanted.exp() * (wanted - torch.log_softmax(output / self.temperature, dim=-1))).sum(-1)
        return kl.flatten(1).mean(1) if kl.ndim > 1 else kl

    def curvature_root(self, reference: Tensor, signs: Tensor) -> Tensor:
        """See :meth:`Distance.curvature_root`; the Hessian is ``diag(p) - p p'``, the Fisher matrix."""
        p = torch.softmax(reference / self.temperature, dim=-1)
        drawn = p.sqrt() * signs
        return drawn - p * drawn.sum(dim=-1, keepdim=True)

    def curvature_scale(self, output: Tensor) -> float:
        """See :meth:`Distance.curvature_scale`: positions are averaged."""
        return self.temperature**-2 / max(output[0, ..., 0].numel(), 1)

    def softer(self) -> KLDivergence:
        """See :meth:`Distance.softer`: at twice the temperature."""
        return KLDivergence(self.read, SOFT * self.temperature)


class MeanSquaredError(Distance):
    """Mean squared difference, in squared units of the network's output."""

    name = "mse"

    def per_sample(self, output: Tensor, reference: Tensor) -> Tensor:
        """See :meth:`Distance.per_sample`."""
        return (output - reference).square().flatten(1).mean(1)

    def curvature_scale(self, output: Tensor) -> float:
        """See :meth:`Distance.curvature_scale`: values are averaged."""
        return 2.0 / max(output[0].numel(), 1)


class MeanAbsoluteError(Distance):
    """Mean absolute difference (L1), in units of the network's output."""

    name = "l1"

    def per_sample(self, output: Tensor, reference: Tensor) -> Tensor:
        """See :meth:`Distance.per_sample`."""
        return (output - reference).abs().flatten(1).mean(1)


LUMA = (65.481, 128.553, 24.966)
"""Weights of red, green and blue in 0..1 in their luma of 0..219 (ITU-R BT.601, studio range)."""


class LumaSquaredError(MeanSquaredError):
    """Mean squared difference of the luma of colour images, in squared units of the network's output.

    What a peak signal-to-noise ratio on luma sees of an error, and nothing else: for networks that are
    judged by it. Errors that leave luma alone cost nothing.
    """

    name = "luma"

    def per_sample(self, output: Tensor, reference: Tensor) -> Tensor:
        """See :meth:`Distance.per_sample`.

        Raises:
            DataError: unless outputs are ``[N, 3, H, W]``.
        """
        weights = self._weights(output)  # first: it refuses other outputs
        error = ((output - reference) * weights).sum(1)
        return error.square().flatten(1).mean(1)

    def curvature_root(self, reference: Tensor, signs: Tensor) -> Tensor:
        """See :meth:`Distance.curvature_root`: the three colours of a pixel err together.

        Raises:
            DataError: as above.
        """
        return self._weights(reference) * signs[:, :1]

    def curvature_scale(self, output: Tensor) -> float:
        """See :meth:`Distance.curvature_scale`: pixels are averaged."""
        return 2.0 / max(output[0, 0].numel(), 1)

    @staticmethod
    def _weights(like: Tensor) -> Tensor:
        if like.ndim != 4 or like.shape[1] != len(LUMA):
            raise DataError(
                f"the luma distance is for colour images [N, 3, H, W], not for an output "
                f"{list(like.shape)}: use mse"
            )
        return like.new_tensor(LUMA).view(3, 1, 1) / 255


class TaskLoss:
    """A loss of the output and the true targets, for those who have labels.

    Args:
        function: ``(output, targets) -> scalar``; cross-entropy by default.
        read: picks the tensor out of the model's output.
    """

    needs, instead = "the task loss needs labels", "kl"

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, read: Reader = first_tensor
    ) -> None:
        self.function = function
        self.read = read

    def __call__(self, output: Any, reference: Tensor, targets: Tensor | None) -> Tensor:
        """See :class:`SearchLoss`."""
        if targets is None:
            raise DataError(f"{self.needs}, and the calibration inputs have none; use loss={self.instead}")
        return self.function(self.read(output), targets)


class PictureLoss(TaskLoss):
    """L1 to the pictures that a network that enlarges them is after, in units of its output."""

    needs, instead = "the picture loss needs the pictures themselves", "mse"

    def __init__(self, read: Reader = first_tensor) -> None:
        super().__init__(F.l1_loss, read)


def default_distance(reference: Tensor) -> Distance:
    """KL for logits (up to three axes), mean squared error for images (four and more)."""
    return KLDivergence() if reference.ndim <= 3 else MeanSquaredError()
