"""Functions that return a :class:`LoadedModel`; configuration files name them as targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

import timm
import torchvision
from timm.data.config import resolve_model_data_config
from torch import nn

from dqss.errors import ModelError, UserError, near_match
from dqss.models.checkpoint import load_checkpoint
from dqss.models.loaded import InputConfig, LoadedModel
from dqss.models.resnet_cifar import CifarResNet

_T = TypeVar("_T")
_CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
# Pixels of scikit-learn's digits in 0..1: mean and deviation of the training part.
DIGITS_INPUT = InputConfig(size=(1, 8, 8), mean=(0.305,), std=(0.376,))
DIGITS_WEIGHTS = "digits_resnet20.safetensors"


def timm_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    checkpoint_mapping: str = "name",
    **kwargs: Any,
) -> LoadedModel:
    """A model of timm's.

    Args:
        name: timm's name, such as ``mobilenetv2_100``; a tag (``resnet18.a1_in1k``) is allowed.
        pretrained: download timm's weights; not done where a checkpoint is given.
        checkpoint: file with weights.
        num_classes: number of logits, where it is not that of the pretrained weights.
        checkpoint_mapping: ``name``, or ``order`` for files with the same tensors in the same
            order under other names.
        **kwargs: further arguments of ``timm.create_model``.

    Raises:
        ModelError: for an unknown name, weights that cannot be fetched, or a bad checkpoint.
    """
    if "checkpoint_path" in kwargs:
        raise ModelError("model.checkpoint_path is not used here: give model.checkpoint=FILE")
    local = ":" in name
    if not local and not timm.is_model(name):
        hint = near_match(name, timm.list_models()) or "; see timm.list_models()"
        raise ModelError(f"timm has no model {name!r}{hint}")
    fetch = pretrained and checkpoint is None
    module = _created(
        f"timm's {name}",
        lambda: timm.create_model(name, pretrained=fetch, num_classes=num_classes, **kwargs),
        fetched=fetch or local,
    )
    found: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    channels, height, width = found["input_size"]
    config = InputConfig(
        size=(channels, height, width),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        crop_mode=found["crop_mode"],
    )
    return _finished(module, "timm", name, checkpoint, checkpoint_mapping, config)


def torchvision_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    checkpoint_mapping: str = "name",
    **kwargs: Any,
) -> LoadedModel:
    """A model of torchvision's.

    Args:
        name: torchvision's name, such as ``mobilenet_v2``.
        pretrained: download the weights; not done where a checkpoint is given.
        checkpoint: file with weights.
        num_classes: number of logits, where it is not that of the pretrained weights.
        weights: which published weights, such as ``IMAGENET1K_V1``; None for the newest. It also
            says how images are resized, for a checkpoint too.
        checkpoint_mapping: see :func:`timm_model`.
        **kwargs: further arguments of ``torchvision.models.get_model``.

    Raises:
        ModelError: for an unknown name, weights that cannot be fetched, or a bad checkpoint.
    """
    known = torchvision.models.list_models()
    if name.lower() not in known:
        hint = near_match(name, known) or "; see torchvision.models.list_models()"
        raise ModelError(f"torchvision has no model {name!r}{hint}")
    entries = torchvision.models.get_model_weights(name)
    chosen = weights or "DEFAULT"
    if chosen not in entries.__members__:
        published = ", ".join(entry.name for entry in entries)
        hint = near_match(chosen, entries.__members__)
        raise ModelError(
            f"torchvision's {name} has no weights {chosen!r}{hint}; it has: {published or 'none'}"
        )
    entry = entries[chosen]
    fetch = pretrained and checkpoint is None
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    module = _created(
        f"torchvision's {name}",
        lambda: torchvision.models.get_model(name, weights=entry if fetch else None, **kwargs),
        fetched=fetch,
    )
    return _finished(module, "torchvision", name, checkpoint, checkpoint_mapping, _preset(entry.transforms()))


def own_model(
    target: str,
    checkpoint: str | Path | None = None,
    kwargs: Mapping[str, Any] | None = None,
    input: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    checkpoint_mapping: str = "name",
) -> LoadedModel:
    """A network of the user's, by import path.

    Args:
        target: ``package.module:factory`` or ``package.module.factory``; a class or function that
            returns a ``torch.nn.Module``.
        checkpoint: file with weights.
        kwargs: arguments of the factory.
        input: fields of :class:`InputConfig`, for data groups that read images.
        num_classes: number of logits, to check labels against.
        checkpoint_mapping: see :func:`timm_model`.

    Raises:
        ModelError: if the factory cannot be imported, fails, or returns something else, or the
            checkpoint does not fit.
    """
    factory = _imported(target)
    module = _created(target, lambda: factory(**dict(kwargs or {})), fetched=False)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{target} returned a {type(module).__name__}: expected a torch.nn.Module")
    return _finished(module, "own", target, checkpoint, checkpoint_mapping, _input_config(input), num_classes)


def cifar_resnet(
    name: str = "resnet20",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
) -> LoadedModel:
    """A CIFAR ResNet: resnet20, 32, 44, 56 or 110.

    Raises:
        ModelError: for an unknown name, a bad checkpoint, or ``pretrained``: no weights are shipped.
    """
    if name not in _CIFAR_DEPTHS:
        known = ", ".join(_CIFAR_DEPTHS)
        raise ModelError(f"unknown CIFAR network {name!r}{near_match(name, _CIFAR_DEPTHS)}; known: {known}")
    if pretrained and checkpoint is None:
        raise ModelError(
            f"no CIFAR weights of {name} are shipped: give model.checkpoint=FILE, "
            "or train them with python -m dqss.train"
        )
    module = CifarResNet(_CIFAR_DEPTHS[name], num_classes, in_channels)
    config = InputConfig(size=(in_channels, image_size, image_size))
    if in_channels != 3:
        config = InputConfig(config.size, mean=(0.5,) * in_channels, std=(0.5,) * in_channels)
    return _finished(module, "cifar", name, checkpoint, "name", config, num_classes)


def digits_resnet20(
    name: str = "digits_resnet20", pretrained: bool = True, checkpoint: str | Path | None = None
) -> LoadedModel:
    """ResNet-20 for scikit-learn's 8x8 digits; ``pretrained`` loads the weights in the package.

    Raises:
        ModelError: if a checkpoint does not fit.
    """
    module = CifarResNet(20, num_classes=10, in_channels=1)
    if pretrained and checkpoint is None:
        with as_file(files("dqss.assets") / DIGITS_WEIGHTS) as shipped:
            load_checkpoint(module, shipped, what=name)
    return _finished(module, "digits", name, checkpoint, "name", DIGITS_INPUT, 10)


def _created(what: str, create: Callable[[], _T], *, fetched: bool) -> _T:
    """``create()``; libraries raise errors of all kinds, which become one line."""
    try:
        return create()
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        cause = f"{type(error).__name__}: {reason}"
        if fetched and isinstance(error, OSError):
            raise ModelError(
                f"the weights of {what} could not be fetched ({cause}); give model.checkpoint=FILE"
            ) from error
        raise ModelError(f"{what} could not be built: {cause}") from error


def _finished(
    module: nn.Module,
    source: str,
    name: str,
    checkpoint: str | Path | None,
    mapping: str,
    config: InputConfig | None,
    num_classes: int | None = None,
) -> LoadedModel:
    if checkpoint is not None:
        load_checkpoint(module, checkpoint, what=name, mapping=mapping)
    if num_classes is None:
        num_classes = _num_classes(module)
    return LoadedModel(module.eval(), source, name, config, num_classes)


def _num_classes(module: nn.Module) -> int | None:
    """What timm states; elsewhere the last linear layer of a classifier has it."""
    stated = getattr(module, "num_classes", None)
    if isinstance(stated, int):
        return stated or None
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    torchvision_classifier = type(module).__module__.startswith("torchvision.models.")
    return linears[-1].out_features if torchvision_classifier and linears else None


def _preset(transforms: Any) -> InputConfig | None:
    """The images of torchvision's classifiers; its other presets have no fixed size."""
    if not all(hasattr(transforms, field) for field in ("crop_size", "resize_size", "mean", "std")):
        return None
    crop, resize = transforms.crop_size[-1], transforms.resize_size[-1]
    return InputConfig(
        size=(3, crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_pct=crop / resize,
    )


def _input_config(given: Mapping[str, Any] | None) -> InputConfig | None:
    if not given:
        return None
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    unknown = [key for key in values if key not in InputConfig.__dataclass_fields__]
    if unknown:
        hint = near_match(unknown[0], InputConfig.__dataclass_fields__)
        raise ModelError(f"model.input has no field {unknown[0]!r}{hint}")
    if "size" not in values or len(values["size"]) != 3:
        raise ModelError("model.input.size: expected [channels, height, width]")
    return InputConfig(**values)


def _imported(target: str) -> Callable[..., Any]:
    """The callable at ``package.module:name`` or ``package.module.name``."""
    module_name, _, attribute = target.partition(":") if ":" in target else target.rpartition(".")
    if not module_name or not attribute:
        raise ModelError(f"model.target={target}: expected package.module:factory")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"model.target={target}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ModelError(f"{module_name} has no {attribute!r}{near_match(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"model.target={target} is a {type(found).__name__}: expected a function or class")
    factory: Callable[..., Any] = found
    return factory
