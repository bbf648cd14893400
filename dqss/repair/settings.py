"""What is tuned after a search, and how hard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dqss.blocks import AUTO
from dqss.checks import check_least, check_positive, check_share
from dqss.errors import UserError
from dqss.repair.augment import Transformation, check_steps


@dataclass(frozen=True)
class RepairSettings:
    """Settings of :func:`dqss.repair_strategy`; the group ``repair`` of the configuration.

    Attributes:
        blocks: patterns of modules that are reconstructed as one (BRECQ, arXiv 2102.05426), or
            ``auto`` for those that the network repeats; every layer outside is reconstructed by
            itself. None at all: each layer by itself (AdaRound, arXiv 2004.10568).
        iterations: for each block; 0: no reconstruction.
        batch_size: inputs an iteration.
        learning_rate: of the soft roundings (Adam).
        regularization: weight of the term that pulls roundings to up or down, where the error of the
            block is counted in units of what it was with plain rounding.
        warmup: share of the iterations before that term sets in.
        drop: chance that an activation inside the block stays in float (QDrop, arXiv 2203.05740);
            0: all are quantized, 1: none.
        float_inputs: share of the block's input values that come from the float network and not from
            the quantized one before it (QDrop takes half, AdaRound and BRECQ none).
        clipped_targets: units learn to give what they would with inputs cut off where their grids end, and
            nothing rounded. Otherwise what the float network gives: then weights also learn to make up for
            what the search has chosen to cut off, large values first, since errors are squared.
        learn_steps: the steps of the activations learn too, but for those that are powers of two.
        learn_weight_steps: the steps of the weights learn too, but for powers of two (as in FlexRound,
            arXiv 2306.00317; a code moves by one at most, as in AdaRound).
        learn_biases: biases learn too, where layers have them.
        step_learning_rate: of the logarithms of all these steps, and of biases in units of what the layer
            gives (Adam).
        held_out: share of the inputs that no iteration sees: a block is left as it was where its error
            on them does not fall.
        bias_correction: afterwards, move the mean of every layer's output to what it is in the float
            network (arXiv 1906.04721, section 4.2, empirically).
        augment: transformations of inputs that are learned from, one after the other: ``flip`` and ``crop``
            (images), ``blend`` (real numbers), or functions of a batch and a generator, see
            :mod:`dqss.repair.augment`. The float network says what is wanted for what they make.
        augment_copies: transformed copies of each input, beside itself, that blocks learn from; each costs
            what one more input would in time and in the cache. None without ``augment``.
        network_iterations: afterwards, for all layers at once and end to end: roundings, activation steps and
            biases learn from the distance of the network's output to the float network's, on inputs that are
            transformed anew in each iteration (without ``augment``: on blends of two inputs each); kept where
            that distance falls on the inputs held out. 0: none.
        network_learning_rate: of the roundings then (Adam), in steps of their grids.
        network_step_learning_rate: of the logarithms of activation steps then, and of biases in units of what
            the layer gives (Adam).
        cache_mb: memory for cached inputs and outputs of blocks, in MiB; what goes beyond is on disk. On a
            CUDA device they are in its own memory as long as that suffices.
    """

    blocks: Sequence[str] = (AUTO,)
    iterations: int = 500
    batch_size: int = 32
    learning_rate: float = 0.01
    regularization: float = 1.0
    warmup: float = 0.2
    drop: float = 0.5
    float_inputs: float = 0.5
    clipped_targets: bool = False
    learn_steps: bool = False
    learn_weight_steps: bool = False
    learn_biases: bool = False
    step_learning_rate: float = 0.002
    held_out: float = 0.125
    bias_correction: bool = False
    augment: Sequence[str | Transformation] = ()
    augment_copies: int = 2
    network_iterations: int = 0
    network_learning_rate: float = 0.003
    network_step_learning_rate: float = 0.001
    cache_mb: float = 2048

    def __post_init__(self) -> None:
        blocks = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks or ())
        object.__setattr__(self, "blocks", blocks)
        one = isinstance(self.augment, str) or callable(self.augment)
        object.__setattr__(self, "augment", (self.augment,) if one else tuple(self.augment or ()))
        check_steps(self.augment)
        check_positive(self, "repair", "batch_size", "learning_rate", "step_learning_rate")
        check_positive(self, "repair", "network_learning_rate", "network_step_learning_rate")
        check_least(self, "repair", 0, "iterations", "network_iterations", "regularization", "cache_mb")
        check_least(self, "repair", 0, "augment_copies")
        check_share(self, "repair", "drop", "float_inputs", "held_out", "warmup")
        if self.held_out == 1:
            raise UserError("repair.held_out=1: leaves no inputs to learn from")
