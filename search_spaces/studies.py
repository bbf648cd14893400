"""Search spaces of the studies in ``experiments/``, frozen: changing a default changes no study."""

from __future__ import annotations

from dqss.search_spaces.uniform import uniform
from dqss.space import SearchSpace


def eight(bits: int) -> SearchSpace:
    """Eight candidates a side: per-channel symmetric weights, per-tensor affine activations.

    All layers and the input, at ``bits`` for weights and activations.
    """
    weights = [
        "minmax",
        {"name": "percentile", "p": 99.0},
        {"name": "percentile", "p": 97.0},
        {"name": "percentile", "p": 95.0},
        "mse",
        {"name": "lp", "p": 3.0},
        "aciq_gaussian",
        "aciq_laplace",
    ]
    activations = [
        "minmax",
        {"name": "percentile", "p": 99.9},
        {"name": "percentile", "p": 99.5},
        {"name": "percentile", "p": 99.0},
        "mse",
        {"name": "lp", "p": 3.0},
        "aciq_gaussian",
        "aciq_laplace",
    ]
    space: SearchSpace = uniform(
        bits,
        bits,
        weight_algorithms=weights,
        activation_algorithms=activations,
        name=f"studies.eight({bits})",
    )
    return space
