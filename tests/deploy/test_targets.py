"""A target refuses what it does not have, in one line with the way out, before and after a search."""

import pytest
import torch

from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU, TARGETS, TENSORRT, target_named
from dqss.errors import TargetError
from search_spaces import uniform
from tests.deploy.support import bundle_for
from tests.support.nets import cnn, images, small_space


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        (
            ONNXRUNTIME_CPU,
            {"activation_bits": [8, 4]},
            "no activations as 'minmax@4 affine tensor', 4 bits: it has 8",
        ),
        (
            ONNXRUNTIME_CPU,
            {"weight_bits": [8, 9]},
            "no weights as 'minmax@9 symmetric channel', 9 bits: it has 2 to 8",
        ),
        (ONNXRUNTIME_CPU, {"weight_symmetric": False}, "an affine grid: use a symmetric one"),
        (ONNXRUNTIME_CPU, {"weight_granularity": "group"}, "one scale a group: use one a tensor or channel"),
        (ONNXRUNTIME_CPU, {"activation_granularity": "channel"}, "one scale a channel: use one a tensor"),
        (TENSORRT, {}, "no activations as 'minmax@8 affine tensor', an affine grid: use a symmetric one"),
        (
            TENSORRT,
            {"activation_symmetric": True, "activation_signed": False},
            "an unsigned grid: use a symmetric one",
        ),
    ],
)
def test_search_spaces(target, options, expected) -> None:  # type: ignore[no-untyped-def]
    space = uniform(**{"weight_bits": 8, "activation_bits": 8, **options})
    with pytest.raises(TargetError) as caught:
        target.check_space(space)
    assert expected in str(caught.value) and "search space 'uniform'" in str(caught.value)
    assert f"target {target.name!r}" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    GENERIC.check_space(space)


@pytest.mark.parametrize("name", TARGETS)
def test_what_each_has_passes(name: str) -> None:
    TARGETS[name].check_space(uniform(8, 8, activation_symmetric=True))
    TARGETS[name].check_space(uniform([2, 8], 8, activation_symmetric=True))


def test_strategies() -> None:
    torch.manual_seed(0)
    model, inputs = cnn(), images(4)
    strategy = bundle_for(model, inputs, small_space(6)).strategy
    with pytest.raises(TargetError, match=r"0\.activation: target 'onnxruntime-cpu' has no activations as"):
        ONNXRUNTIME_CPU.check_strategy(strategy)
    GENERIC.check_strategy(strategy)


def test_names() -> None:
    assert target_named("tensorrt") is TENSORRT
    with pytest.raises(TargetError, match=r"target=onnxruntime \(did you mean 'onnxruntime-cpu'\?\)"):
        target_named("onnxruntime")
