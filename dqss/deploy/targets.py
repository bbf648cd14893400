"""What the runtimes that a strategy may be meant for can compute with. No onnx and no torch here.

A target is checked against a search space before the search, so that nothing is searched that could
not be run, and against a strategy when it is exported. Algorithms are free everywhere: they only
choose the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dqss.arithmetic.kinds import EXACT, FAKE_QUANTIZED, ONNXRUNTIME, Arithmetic, IntegerKernels
from dqss.choice import TensorChoice
from dqss.deploy.containers import WEIGHT_WIDTHS
from dqss.errors import TargetError, near_match
from dqss.space import Points, SearchSpace
from dqss.spec import MAX_BITS, MIN_BITS, Candidate, Granularity, PerChannel, PerGroup, PerTensor, QuantSpec
from dqss.strategy import Strategy

Grain = type[PerTensor] | type[PerChannel] | type[PerGroup]
Bias = Literal["float", "int32"]


@dataclass(frozen=True)
class Allowed:
    """Grids that a target has for one kind of tensor.

    Attributes:
        bits: widths.
        symmetric, affine, unsigned: the kinds of grids: around zero, with a zero point, from zero on.
        grains: granularities.
    """

    bits: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))
    symmetric: bool = True
    affine: bool = True
    unsigned: bool = True
    grains: tuple[Grain, ...] = (PerTensor, PerChannel, PerGroup)

    def fault(self, spec: QuantSpec) -> str | None:
        """What is wrong with a grid, and the way out; None for one that is allowed."""
        if spec.bits not in self.bits:
            return f"{spec.bits} bits: it has {_numbers(self.bits)}"
        kind = "affine" if not spec.symmetric else "symmetric" if spec.signed else "unsigned"
        if not getattr(self, kind):
            kinds = [word for word in ("symmetric", "affine", "unsigned") if getattr(self, word)]
            return f"an {kind} grid: use a {' or '.join(kinds)} one".replace("an symm", "a symm")
        if not isinstance(spec.granularity, self.grains):
            return (
                f"one scale a {_grain(spec.granularity)}: use one a {' or '.join(map(_grain, self.grains))}"
            )
        return None


@dataclass(frozen=True)
class Target:
    """A runtime, by what it computes in integers.

    Attributes:
        name: as the command line knows it.
        weight, activation: grids of layers; ``product`` those of the operands of products.
        weight_widths: bits of the integer types that weights are stored in.
        bias: the type that convolutions and matrix products want their bias in.
        signed_activations: whether its integer kernels take them.
        points: where it needs tensors quantized beside the inputs of layers.
        tried: whether files for it have been run here.
        arithmetic: what files compute, as far as it is known, and what they are compared with.
    """

    name: str
    weight: Allowed
    activation: Allowed
    weight_widths: tuple[int, ...] = WEIGHT_WIDTHS
    bias: Bias = "float"
    signed_activations: bool = True
    points: Points | None = None
    tried: bool = True
    arithmetic: Arithmetic = FAKE_QUANTIZED

    def adapt(self, space: SearchSpace) -> SearchSpace:
        """A search space with the points that the target needs, so that what is searched is what runs.

        Raises:
            TargetError: as :meth:`check_space`.
        """
        self.check_space(space)
        return replace(space, points=self.points or space.points)

    def check_space(self, space: SearchSpace) -> None:
        """Refuse a search space with a candidate that the target does not have.

        Raises:
            TargetError: naming the candidate and the way out.
        """
        for rule in space.rules:
            for role, candidates in (("weights", rule.weight), ("activations", rule.activation)):
                self._check(candidates, role, f"search space {space.name!r}")

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a strategy with a choice that the target does not have.

        Raises:
            TargetError: naming the tensor, the choice and the way out.
        """
        for layer, role, choice in strategy.choices():
            self._check(
                [_candidate(choice)], "weights" if role == "weight" else "activations", f"{layer}.{role}"
            )

    def arithmetic_of(self, strategy: Strategy) -> Arithmetic:
        """What a file with this strategy is compared with: integer kernels need points between them."""
        known = self.arithmetic
        return FAKE_QUANTIZED if isinstance(known, IntegerKernels) and not strategy.points else known

    def in_form(self, exact: bool | None) -> Target:
        """With layers in exact sums, or as the pattern that runtimes look for; None leaves it.

        Raises:
            TargetError: for a target whose runtime needs that pattern.
        """
        if exact is None:
            return self
        if exact and self.arithmetic != EXACT:
            raise TargetError(
                f"target={self.name} has integer kernels, which look for another pattern: exact=true is for "
                f"target={GENERIC.name}"
            )
        return self if exact or self.arithmetic != EXACT else replace(self, arithmetic=FAKE_QUANTIZED)

    def _check(self, candidates: Iterable[Candidate], role: str, where: str) -> None:
        allowed = self.weight if role == "weights" else self.activation
        for candidate in candidates:
            fault = allowed.fault(candidate.spec)
            if fault is not None:
                raise TargetError(
                    f"{where}: target {self.name!r} has no {role} as {candidate.title!r}, {fault}; "
                    f"target={GENERIC.name} takes everything"
                )


def _candidate(choice: TensorChoice) -> Candidate:
    return choice.candidate()


def _grain(grain: Granularity | Grain) -> str:
    kind = grain if isinstance(grain, type) else type(grain)
    return {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group"}[kind]


def _numbers(bits: tuple[int, ...]) -> str:
    whole = len(bits) > 2 and bits == tuple(range(bits[0], bits[-1] + 1))
    return f"{bits[0]} to {bits[-1]}" if whole else " and ".join(map(str, bits))


GENERIC = Target("generic", Allowed(), Allowed(grains=(PerTensor, PerChannel)), arithmetic=EXACT)
"""Whatever ONNX can say, with the same answers in any runtime. Weights of up to four bits are packed two a
byte."""

ONNXRUNTIME_CPU = Target(
    "onnxruntime-cpu",
    weight=Allowed(
        bits=tuple(range(MIN_BITS, 9)), affine=False, unsigned=False, grains=(PerTensor, PerChannel)
    ),
    activation=Allowed(bits=(8,), grains=(PerTensor,)),
    weight_widths=(8,),
    bias="int32",
    signed_activations=False,
    points=Points(("Conv1d", "Conv2d", "Conv3d")),
    arithmetic=ONNXRUNTIME,
)
"""What the integer kernels of ONNX Runtime on a CPU take: eight bits in and out, weights of up to eight
bits around zero. Those of convolutions give integers too, so that their outputs have to be quantized;
those of matrix products may give real numbers. They read bytes, so that narrow weights take a byte too;
on x86 they take unsigned activations only, so that grids around zero are moved."""

TENSORRT = Target(
    "tensorrt",
    weight=Allowed(
        bits=tuple(range(MIN_BITS, 9)), affine=False, unsigned=False, grains=(PerTensor, PerChannel)
    ),
    activation=Allowed(bits=(8,), affine=False, unsigned=False, grains=(PerTensor,)),
    weight_widths=(8,),
    tried=False,
)
"""NVIDIA TensorRT with explicit quantization: signed integers of eight bits, zero points of zero, one
scale a tensor for activations and a channel for weights (its documentation, "Working with Quantized
Types"). Written after the documentation; no file has been run there by us."""

TARGETS = {target.name: target for target in (GENERIC, ONNXRUNTIME_CPU, TENSORRT)}


def target_named(name: str) -> Target:
    """The target that the command line calls ``name``.

    Raises:
        TargetError: for an unknown one.
    """
    if name not in TARGETS:
        raise TargetError(f"target={name}{near_match(name, TARGETS)}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
