"""``python -m dqss.train``: train a classifier and write its weights as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from safetensors.torch import save
from torch import nn

from dqss import cli
from dqss.data.in_memory import InMemoryData
from dqss.errors import DataError
from dqss.io import ensure_folder, write_bytes_atomic
from dqss.lit.train import train_classifier


@cli.command("train")
def main(config: DictConfig) -> float:
    """Train as the configuration says; returns the validation accuracy in 0..1."""
    output = Path(config.output or Path(HydraConfig.get().runtime.output_dir) / "weights.safetensors")
    accuracy = train(config, output)
    print(f"validation accuracy {100 * accuracy:.2f} %, weights in {output}")
    return accuracy


def train(config: DictConfig, output: Path) -> float:
    """Build, fit, save; returns the validation accuracy in 0..1.

    Raises:
        DataError: if the data group has no training part.
        OutputError: if the weights cannot be written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    loaded, data = cli.make(config.model, "model"), cli.make(config.data, "data")
    if not isinstance(data, InMemoryData):
        raise DataError(f"data={type(data).__name__.lower()} has no training part: use digits or cifar10")
    data.configure(loaded.input, loaded.num_classes)
    print(data.summary())
    ensure_folder(output.parent)
    accuracy = train_classifier(loaded.module, data, config.optimizer, config.trainer, config.seed)
    write_bytes_atomic(output, _weights(loaded.module))
    return accuracy


def _weights(module: nn.Module) -> bytes:
    """The floating-point state as a safetensors file."""
    state = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
    return save({key: value.detach().cpu().contiguous() for key, value in state.items()})


if __name__ == "__main__":
    cli.run(main)
