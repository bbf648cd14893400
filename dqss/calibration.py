"""What runs the float network while its quantizers watch: first the values, then their gradients.

How much does an error ``e`` in one tensor (a weight, a layer's input) move the output? To second
order the distance of the outputs grows by ``e' J' H J e / 2``, with J the Jacobian of the output
with respect to the tensor and H the Hessian of the distance at the float output: the Fisher
matrix for the KL divergence, the identity for squared errors. Its diagonal is the mean of the
squares of ``J' v`` over random vectors v with ``E[v v'] = H``, so a backward pass from one such
vector estimates it without bias, for all tensors at once. No labels are needed, and it does not
vanish where the network is certain, as gradients of its own best class do (squared gradients as
the diagonal of the Hessian: arXiv 2102.05426; what is wrong with labels there: arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqss.calls import call_model, first_tensor
from dqss.errors import NonFiniteError
from dqss.losses import Distance, default_distance
from dqss.mixed import MixedQuantizer, MixedWeight


def probe(
    model: nn.Module, quantizers: Iterable[MixedQuantizer], batches: Iterable[Any], distance: Distance | None
) -> int:
    """Run ``batches`` forward and backward through quantizers that are in probe mode.

    The vectors v are a function of the position of the batch alone. A batch of one image gives
    the sharpest estimate an evaluation.

    Args:
        model: the float network with the quantizers attached; its parameters stay frozen.
        quantizers: all of them.
        batches: inputs.
        distance: whose Hessian is meant; by default the one that suits the output.

    Returns:
        The number of batches.
    """
    weights = [quantizer for quantizer in quantizers if isinstance(quantizer, MixedWeight)]
    generator = torch.Generator().manual_seed(0)
    count = 0
    with torch.enable_grad():
        for batch in batches:
            output = call_model(model, batch)
            if distance is None:
                distance = default_distance(first_tensor(output))
            read = distance.read(output)
            signs = random_signs(read, generator)
            if read.requires_grad:
                vector = distance.curvature_root(read.detach().float(), signs).to(read.dtype)
                torch.autograd.backward([read], [vector])
            for weight in weights:
                weight.collect()
            count += 1
    return count


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs as fp32, drawn on the CPU, so that devices agree."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float32)
    return (2 * drawn - 1).to(like.device)


@contextmanager
def naming(observers: Mapping[str, nn.Module]) -> Iterator[Callable[[str, nn.Module], None]]:
    """Put a label, such as ``input of layer 'head'``, before what an observer complains about.

    Yields:
        A function that adds an observer with its label.
    """
    current: list[str] = []
    handles = []

    def add(label: str, observer: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any = None) -> None:
            current[:] = [label]

        handles.append(observer.register_forward_pre_hook(hook))

    for label, observer in observers.items():
        add(label, observer)
    try:
        yield add
    except NonFiniteError as error:
        raise NonFiniteError(f"{current[0]}: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
