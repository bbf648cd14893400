"""Models by name, by import path, from the package; and what goes wrong with names and networks."""

import socket
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from dqss.errors import ModelError
from dqss.models.factory import cifar_resnet, digits_resnet20, own_model, timm_model, torchvision_model
from dqss.models.loaded import InputConfig


def refused(match: str, factory: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        factory(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_timm_model_brings_its_own_input_configuration() -> None:
    loaded = timm_model("tf_efficientnet_lite0", num_classes=7)
    assert loaded.source == "timm" and loaded.num_classes == 7 and not loaded.module.training
    config = loaded.input
    assert config is not None and config.size == (3, 224, 224) and config.crop_pct == 0.875
    assert config.mean == config.std == (0.5, 0.5, 0.5) and config.interpolation == "bicubic"


def test_timm_model_takes_a_checkpoint_in_place_of_a_download(tmp_path: Path, no_network: None) -> None:
    source = timm.create_model("mobilenetv3_small_050", num_classes=4)
    torch.save(source.state_dict(), tmp_path / "net.pth")
    name, path = "mobilenetv3_small_050", tmp_path / "net.pth"
    loaded = timm_model(name, pretrained=True, checkpoint=path, num_classes=4)
    for key, value in source.state_dict().items():
        assert torch.equal(value, loaded.module.state_dict()[key])
    assert "classifier.weight" in refused("does not fit", timm_model, name, checkpoint=path)
    refused("give model.checkpoint=FILE", timm_model, name, checkpoint_path=str(path))


def test_names_that_do_not_exist_get_the_near_match() -> None:
    refused("did you mean 'mobilenetv2_100'", timm_model, "mobilnetv2_100")
    refused("did you mean 'mobilenet_v2'", torchvision_model, "mobilenetv2")
    refused("IMAGENET1K_V1, IMAGENET1K_V2", torchvision_model, "mobilenet_v2", weights="V1")
    refused("did you mean 'resnet56'", cifar_resnet, "resnt56")
    refused("could not be built.*foo", timm_model, "resnet18.foo", pretrained=True)
    refused("could not be built.*depthh", timm_model, "resnet18", depthh=3)
    refused("could not be built.*1000", torchvision_model, "resnet18", pretrained=True, num_classes=7)


def test_weights_that_cannot_be_fetched(no_network: None) -> None:
    refused("could not be fetched.*model.checkpoint=FILE", timm_model, "resnet18", pretrained=True)
    refused("could not be fetched.*model.checkpoint=FILE", torchvision_model, "resnet18", pretrained=True)
    refused("model.checkpoint=FILE", cifar_resnet, "resnet20", pretrained=True)


def test_torchvision_model_follows_the_named_weights() -> None:
    newest = torchvision_model("mobilenet_v2").input
    first = torchvision_model("mobilenet_v2", weights="IMAGENET1K_V1", num_classes=6)
    assert newest is not None and first.input is not None and first.num_classes == 6
    assert newest.crop_pct == pytest.approx(224 / 232) and first.input.crop_pct == pytest.approx(224 / 256)
    preset = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    assert first.input.mean == tuple(preset.mean) and first.input.interpolation == preset.interpolation.value


OWN = """
import torch.nn as nn
value = 3
def tiny(width=4, bad=False):
    if bad:
        raise RuntimeError("first line\\nsecond line")
    return nn.Linear(width, 2)
def nothing():
    return None
class Nested:
    Net = nn.Identity
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "dqss_test_own.py").write_text(OWN)
    (tmp_path / "dqss_test_broken.py").write_text("import dqss_test_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dqss_test_own", raising=False)
    return "dqss_test_own"


def test_own_model_by_import_path(own_module: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 6), "bias": torch.zeros(2)}, tmp_path / "w.pth")
    for target in (f"{own_module}:tiny", f"{own_module}.tiny"):
        loaded = own_model(target, checkpoint=tmp_path / "w.pth", kwargs={"width": 6}, num_classes=2)
        assert isinstance(loaded.module, nn.Linear) and loaded.module.weight.sum() == 12
        assert loaded.input is None and loaded.num_classes == 2
    assert isinstance(own_model(f"{own_module}:Nested.Net").module, nn.Identity)
    config = own_model(f"{own_module}:tiny", input={"size": [1, 28, 28], "mean": [0.1], "std": [0.3]}).input
    assert config == InputConfig(size=(1, 28, 28), mean=(0.1,), std=(0.3,))


def test_own_model_faults_are_named(own_module: str) -> None:
    refused("no_such_module cannot be imported", own_model, "no_such_module:net")
    refused("dqss_test_absent", own_model, "dqss_test_broken:net")
    refused("did you mean 'tiny'", own_model, f"{own_module}:tinny")
    refused("expected package.module:factory", own_model, "net")
    refused("is a int", own_model, f"{own_module}:value")
    refused("returned a NoneType", own_model, f"{own_module}:nothing")
    refused("RuntimeError: first line", own_model, f"{own_module}:tiny", kwargs={"bad": True})
    refused("TypeError", own_model, f"{own_module}:tiny", kwargs={"widht": 3})
    refused("did you mean 'mean'", own_model, f"{own_module}:tiny", input={"size": [3, 8, 8], "maen": [0]})
    refused("channels, height, width", own_model, f"{own_module}:tiny", input={"size": [8, 8]})
    for scale in (0, "2", 1.5):
        refused(
            "scale=.*whole number", own_model, f"{own_module}:tiny", input={"size": [3, 8, 8], "scale": scale}
        )


def test_shipped_digits_weights_differ_from_fresh_ones() -> None:
    shipped, again, fresh = digits_resnet20(), digits_resnet20(), digits_resnet20(pretrained=False)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(shipped.module(x), again.module(x))
    assert not torch.equal(shipped.module(x), fresh.module(x))
