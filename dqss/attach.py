"""Put quantizers on layers without wrapping them.

A parametrization on the weight and a forward pre-hook on the input keep class, attributes and
names of the layer alive, so models that read ``layer.weight`` or ``layer.kernel_size`` go on
working. Both survive ``deepcopy``: nothing here closes over a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

INPUT_QUANTIZER = "input_quantizer"
OUTPUT_QUANTIZER = "output_quantizer"


def attach_weight(layer: nn.Module, quantizer: nn.Module) -> None:
    """Pass ``layer.weight`` through ``quantizer`` whenever it is read."""
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)


def detach_weight(layer: nn.Module) -> None:
    """Undo :func:`attach_weight`; the original parameter comes back."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def attach_input(layer: nn.Module, quantizer: nn.Module) -> None:
    """Pass the first tensor that ``layer`` is called with through ``quantizer``."""
    layer.add_module(INPUT_QUANTIZER, quantizer)
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def detach_input(layer: nn.Module) -> None:
    """Undo :func:`attach_input`."""
    hooks: dict[int, Callable[..., Any]] = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_input]:
        del hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(layer, INPUT_QUANTIZER)


def attach_output(layer: nn.Module, quantizer: nn.Module) -> None:
    """Pass the tensor that ``layer`` returns through ``quantizer``."""
    layer.add_module(OUTPUT_QUANTIZER, quantizer)
    layer.register_forward_hook(_quantize_output)


def detach_output(layer: nn.Module) -> None:
    """Undo :func:`attach_output`."""
    hooks: dict[int, Callable[..., Any]] = layer._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_output]:
        del hooks[key]
    delattr(layer, OUTPUT_QUANTIZER)


def forbid_nested(model: nn.Module) -> None:
    """Keep torch's transformer encoders from turning padded batches into nested tensors.

    They would do so only where no gradient is wanted, so that padded positions would come out
    different from one mode to another; and no observer can read a nested tensor.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def original_weight(layer: nn.Module) -> Tensor:
    """The layer's own weight, under any parametrization."""
    if parametrize.is_parametrized(layer, "weight"):
        found: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        return found
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _quantize_input(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    quantizer = getattr(layer, INPUT_QUANTIZER)
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], quantizer(value), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: quantizer(value)}
    return args, kwargs


def _quantize_output(layer: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    found: Tensor = getattr(layer, OUTPUT_QUANTIZER)(output)
    # The network may write into its layers' outputs, and autograd refuses that for functions of ours.
    return found.clone() if found.requires_grad and found is not output else found
