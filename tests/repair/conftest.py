"""The network that is repaired, and a strategy for it."""

from __future__ import annotations

import pytest
from torch import nn

from dqss.bundle import Bundle
from tests.repair.support import network, pictures, strategy_for


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def bundle(model: nn.Module) -> Bundle:
    return strategy_for(model, pictures())
