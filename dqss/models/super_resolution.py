"""Networks that enlarge images, by name; configuration files name this as their target."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from dqss.errors import ModelError, near_match
from dqss.models.blocks import SuperResolver
from dqss.models.checkpoint import load_checkpoint
from dqss.models.ditn import DITN, ChannelNorm
from dqss.models.edsr import EDSR
from dqss.models.loaded import InputConfig, LoadedModel
from dqss.models.rlfn import RLFN

NETWORKS: dict[str, Callable[[int], SuperResolver]] = {
    "rlfn": RLFN,
    "rlfn_s": lambda scale: RLFN(scale, channels=48),
    "rlfn_ntire": lambda scale: RLFN(scale, channels=46, blocks=4, inner=48),
    "ditn_real": DITN,
    "ditn_tiny": lambda scale: DITN(scale, normalize=ChannelNorm),
    # The number of units of the full network is our reading: its code is not public.
    "ditn": lambda scale: DITN(scale, units=3, normalize=ChannelNorm),
    "edsr_baseline": EDSR,
}
"""Each makes the network for a factor of 2, 3 or 4."""

PHOTOGRAPHS_WEIGHTS = "photographs_rlfn_x2.safetensors"

# Pixels a side of the low-resolution patches that these networks are trained on.
_PATCH = 64


def super_resolution(
    name: str = "rlfn",
    scale: int = 4,
    checkpoint: str | Path | None = None,
    checkpoint_mapping: str = "name",
    trained: bool = False,
) -> LoadedModel:
    """A super-resolution network; see also :func:`photographs_rlfn`, whose weights are shipped.

    Args:
        name: one of ``NETWORKS``.
        scale: factor by which it enlarges: 2, 3 or 4.
        checkpoint: file with weights; None leaves random ones.
        checkpoint_mapping: ``name``, or ``order`` for files with the same tensors in the same
            order under other names.
        trained: refuse to leave random weights.

    Raises:
        ModelError: for an unknown name, another scale, or a bad checkpoint.
    """
    if name not in NETWORKS:
        hint = near_match(name, NETWORKS)
        raise ModelError(f"unknown super-resolution network {name!r}{hint}; known: {', '.join(NETWORKS)}")
    module = NETWORKS[name](scale)
    if trained and checkpoint is None:
        raise ModelError(f"no weights of {name} x{scale} are shipped: give model.checkpoint=FILE")
    if checkpoint is not None:
        options = "model.name and model.scale"
        load_checkpoint(
            module, checkpoint, what=f"{name} x{scale}", mapping=checkpoint_mapping, options=options
        )
    return LoadedModel(module.eval(), "super_resolution", name, input_of(module))


def photographs_rlfn(
    name: str = "photographs_rlfn_x2", pretrained: bool = True, checkpoint: str | Path | None = None
) -> LoadedModel:
    """A small RLFN that enlarges twice, with the weights in this package.

    Args:
        name: recorded in the strategy.
        pretrained: load those weights; not done where a checkpoint is given.
        checkpoint: file with other weights.

    Raises:
        ModelError: if a checkpoint does not fit.
    """
    module = RLFN(2, channels=32, blocks=4)
    if checkpoint is not None:
        load_checkpoint(module, checkpoint, what=name)
    elif pretrained:
        with as_file(files("dqss.assets") / PHOTOGRAPHS_WEIGHTS) as shipped:
            load_checkpoint(module, shipped, what=name)
    return LoadedModel(module.eval(), "photographs", name, input_of(module))


def input_of(model: SuperResolver) -> InputConfig:
    """The images that a super-resolution network expects, as data groups read it."""
    return InputConfig(
        size=(3, _PATCH, _PATCH),
        mean=(0.0,) * 3,
        std=(1 / model.peak,) * 3,
        scale=model.scale,
        smallest=model.smallest,
    )
