"""What a search does with the layers and products of a network, for people to read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Coverage:
    """What happened to the layers that the search space named; for the user to read.

    Attributes:
        skipped: left in float by the search space.
        weight_only: weight is read but forward never called (or never with real numbers).
        unused: neither called nor read by any calibration input; left in float.
        tied: groups of layers that share one weight, and so one decision.
        plain: layers whose weights are rounded to the nearest code also where a candidate fits them to
            inputs, because their inputs cannot be taken apart.
        ties: groups of tensors (``conv1.weight``) that share one decision as the search space asks.
        products: products of two activations in float, because the search space leaves all of them.
        hidden_products: those that cannot be searched: hidden in a function, in a container, mixed
            with other kinds of operands, or in a module that does not always multiply alike.
        hidden_points: additions, concatenations and averages that should be quantized for the target and
            cannot be, for the same reasons.
    """

    skipped: list[str] = field(default_factory=list)
    weight_only: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    tied: list[list[str]] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    hidden_products: list[str] = field(default_factory=list)
    hidden_points: list[str] = field(default_factory=list)
