"""The small RLFN in the package: its size, and that it beats interpolation where it was not trained."""

from importlib.resources import files

import pytest
import torch

from dqss.data.photographs import Photographs
from dqss.errors import ModelError
from dqss.lit.super_resolution import measure, measure_bicubic
from dqss.models.rlfn import RLFN
from dqss.models.super_resolution import PHOTOGRAPHS_WEIGHTS, photographs_rlfn


def test_it_is_small_and_beats_bicubic_on_other_photographs() -> None:
    found = photographs_rlfn()
    assert isinstance(found.module, RLFN) and not found.module.training
    assert len((files("dqss.assets") / PHOTOGRAPHS_WEIGHTS).read_bytes()) < 1_000_000
    data = Photographs()
    data.configure(found.input)
    reached, bicubic = measure(found.module, data), measure_bicubic(data)
    assert reached is not None and bicubic is not None and reached > bicubic + 0.5


def test_other_weights_and_none() -> None:
    torch.manual_seed(0)
    one = photographs_rlfn(pretrained=False).module
    assert not torch.equal(one.conv_1.weight, photographs_rlfn().module.conv_1.weight)
    with pytest.raises(ModelError, match=r"none\.pth"):
        photographs_rlfn(checkpoint="none.pth")
