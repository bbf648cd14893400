"""ModelOpt (``nvidia-modelopt``, in an environment of its own), as the studies compare with it."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dqss.samples import Samples

BATCH = 16
Format = dict[str, Any]


def w8a8() -> Format:
    """ModelOpt's own recipe: weights per channel, inputs per tensor, clipped at the largest value."""
    import modelopt.torch.quantization as mtq

    return copy.deepcopy(mtq.INT8_DEFAULT_CFG)


def auto_quantize(
    model: nn.Module, images: Tensor, labels: Tensor, formats: list[Format], effective_bits: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Its search by gradients; every layer is quantized (``allow_no_quant=False``).

    Args:
        model: float; it is not changed.
        images, labels: to calibrate with and to take gradients of cross-entropy of.
        formats: to choose from, for each layer.
        effective_bits: that it may not exceed.

    Returns:
        The network, and the best of ModelOpt's own states.
    """
    import modelopt.torch.quantization as mtq

    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    space = {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": False}
    found, state = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": effective_bits},
        quantization_formats=copy.deepcopy(formats),
        data_loader=batches,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
        module_search_spaces=[space],
    )
    return found, state["best"]


def quantize(model: nn.Module, images: Tensor, one: Format) -> nn.Module:
    """One format for all layers, without a search."""
    import modelopt.torch.quantization as mtq

    def run(network: nn.Module) -> None:
        for batch in images.split(BATCH):
            network(batch)

    found: nn.Module = mtq.quantize(copy.deepcopy(model), one, run)
    return found


def labelled(samples: Samples) -> tuple[Tensor, Tensor]:
    """All images and their labels."""
    everything = range(len(samples))
    labels = samples.targets(everything)
    if labels is None:
        raise SystemExit(
            "error: ModelOpt's gradients are those of a loss of labels: put images in class folders"
        )
    return samples.batch(everything), labels
