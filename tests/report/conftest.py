"""Finished searches of networks with names that a page must not believe."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.contenders import Validation
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.metrics import task_metric
from tests.support.nets import THREE, small_space

SCRIPT = "<script>alert(1)<"
"""Module names may hold anything but dots; this one closes no tag by itself ..."""
CLOSING = "</script><img src=x onerror=alert(2)>"
"""... and this one does."""
QUICK = PTQSettings(
    steps=6, batch_size=8, refine=RefineSettings(passes=2), discrete_every=3, discrete_images=4
)


def hostile(classes: int = 4) -> nn.Module:
    """A small classifier of ``[N, 3, 8, 8]``."""
    net = nn.Sequential()
    net.add_module(SCRIPT, nn.Conv2d(3, 6, 3, stride=2))
    net.add_module("relu", nn.ReLU())
    net.add_module(CLOSING, nn.Conv2d(6, 6, 3))
    net.add_module("flat", nn.Flatten())
    net.add_module("head & tail", nn.Linear(6, classes))
    return net.eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a classifier, with validation data."""
    return searched(tmp_path_factory.mktemp("report") / "run", seed=0)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another seed."""
    return searched(tmp_path_factory.mktemp("report") / "other", seed=1)


def searched(folder: Path, seed: int) -> Path:
    torch.manual_seed(5)
    inputs = torch.randn(60, 3, 8, 8)
    labels = torch.randint(0, 4, (20,))
    name, metric = task_metric("classification", 4)
    validation = Validation([(inputs[40:], labels)], metric, name)
    search_ptq(
        hostile(), inputs[:40], small_space(2, THREE), QUICK, validation=validation, run_dir=folder, seed=seed
    )
    return folder


class Doubler(nn.Module):
    """Pictures twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 3, 2 H, 2 W]``."""
        return self.shuffle(self.body(x))


@pytest.fixture(scope="session")
def enlarged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a network that enlarges pictures, without validation data."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("report") / "enlarged"
    search_ptq(Doubler(), torch.rand(20, 3, 16, 16), small_space(2), QUICK, run_dir=folder, report_images=3)
    return folder
