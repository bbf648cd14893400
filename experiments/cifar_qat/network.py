"""The network of the study, its images, and the float weights that every row starts from."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dqss.data.arrays import ArrayDataset, Augment, Collate, Normalize
from dqss.lit.train import ClassifierTraining
from dqss.models.factory import cifar_resnet
from dqss.models.loaded import InputConfig
from dqss.samples import Samples
from experiments.harness import CPU

INPUT = InputConfig(size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CALIBRATION = 512
FLOAT_EPOCHS, FLOAT_RATE = 10, 0.02


def read(path: Path) -> ArrayDataset:
    """The images ``[N, 3, 32, 32]`` uint8 of an archive of JPEGs, with their labels."""
    with np.load(path) as archive:
        data, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    runs = (data[first:last] for first, last in itertools.pairwise(offsets))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(run))) for run in runs]))
    return ArrayDataset(images.permute(0, 3, 1, 2), torch.from_numpy(labels).long())


class Cifar:
    """Augmented training batches, calibration inputs and test batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.test = (read(folder / f"{part}_jpeg.npz") for part in ("train", "test"))
        self.normalize = Normalize(INPUT)

    def training(self, batch_size: int = 128) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shifted by up to four pixels, mirrored, shuffled."""
        collate = Collate(self.normalize, Augment(shift=4, mirror=True))
        return DataLoader(self.train, batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def testing(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All test images."""
        return DataLoader(self.test, 250, collate_fn=Collate(self.normalize))

    def calibration(self, seed: int) -> Samples:
        """Training images as they are, another choice for each seed."""
        chosen = np.random.default_rng(seed).permutation(len(self.train))[:CALIBRATION].tolist()
        return Samples(list(self.normalize(self.train.pixels(chosen))))


def float_network(data: Cifar, work: Path) -> nn.Module:
    """The pretrained network, trained on: it was not made for images that are compressed like these."""
    model: nn.Module = cifar_resnet(checkpoint=str(data.folder / "resnet20-12fca82f.th")).module
    file = work / "float.safetensors"
    if not file.exists():
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(
            **CPU,
            max_epochs=FLOAT_EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(ClassifierTraining(model.train(), FLOAT_RATE, 1e-4), data.training())
        work.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()
