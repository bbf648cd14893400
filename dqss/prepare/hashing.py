"""The identity of a network's weights: hashes that do not depend on how the network is wrapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dqss.errors import ModelError, NonFiniteError
from dqss.prepare.modules import canonical_name, is_batch_norm, unwrap

_SHOWN = 3


def _digest(tensor: Tensor) -> str:
    """Sha256 of dtype, shape and raw bytes."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """Sha256 of each tensor of the unwrapped model's state dict, sorted by name."""
    model = unwrap(model)
    tensors = {canonical_name(model, name): value for name, value in model.state_dict().items()}
    return {name: _digest(tensors[name]) for name in sorted(tensors) if isinstance(tensors[name], Tensor)}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """The first 16 hex digits of each state-dict tensor's sha256, to say which layers differ."""
    return {name: value[:16] for name, value in digests(model).items()}


def weights_sha256(model: nn.Module) -> str:
    """One sha256 of the whole state dict: names, dtypes, shapes and raw bytes, sorted by name."""
    return combine(digests(model))


def combine(each: Mapping[str, str]) -> str:
    """The sha256 of a model from the sha256 of its tensors."""
    lines = "".join(f"{name} {each[name]}\n" for name in sorted(each))
    return hashlib.sha256(lines.encode()).hexdigest()


def _finite(tensor: Tensor, minus_infinity: bool) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:  # float8 knows no comparisons
        tensor = tensor.float()
    good = torch.isfinite(tensor)
    if minus_infinity and not tensor.is_complex():
        good = good | (tensor == -torch.inf)
    return bool(good.all())


def check_finite(model: nn.Module) -> None:
    """Refuse NaN and infinity in parameters and buffers.

    Minus infinity is allowed in buffers other than batch-norm statistics: attention masks hold it.

    Raises:
        NonFiniteError: naming the tensors.
        ModelError: for weights that have no values yet (meta device, lazy modules).
    """
    bad = []
    for prefix, module in model.named_modules():
        masks = not is_batch_norm(module)
        own = [(name, value, False) for name, value in module.named_parameters(prefix, recurse=False)]
        own += [(name, value, masks) for name, value in module.named_buffers(prefix, recurse=False)]
        for name, value, minus_infinity in own:
            if is_lazy(value) or value.is_meta:
                raise ModelError(f"{name!r} has no values yet: load or initialize the weights first")
            if not _finite(value.detach(), minus_infinity):
                bad.append(name)
    if bad:
        shown = ", ".join(repr(name) for name in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise NonFiniteError(f"NaN or infinity in {shown}{more}: load a sound checkpoint")
