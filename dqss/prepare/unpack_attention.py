"""Take torch's multi-head attention apart into layers that are called.

``nn.MultiheadAttention`` (arXiv 1706.03762) holds the projections of queries, keys and values in
one packed parameter, reads the weight of its output projection without calling it, and multiplies
inside a function. In its place comes a module that computes the same from four linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.calls import tensors_in
from dqss.prepare.modules import replace
from dqss.prepare.work import Work, difference, reproducible, run, tolerance

_TOLERANCE = 1e-4
_KEPT = (
    "embed_dim",
    "kdim",
    "vdim",
    "_qkv_same_embed_dim",
    "num_heads",
    "head_dim",
    "dropout",
    "batch_first",
)


class UnpackedAttention(nn.MultiheadAttention):
    """Multi-head attention from the layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    A subclass, because encoders look at the attributes of their attention. Those that the fused
    kernels of torch would read (``in_proj_weight``, ``in_proj_bias``) are None: that keeps them away.

    Args:
        packed: what is replaced; it shares no memory with this.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        for name in _KEPT:
            setattr(self, name, getattr(packed, name))
        self.add_zero_attn, self.bias_k, self.bias_v = False, None, None
        for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, None)
        separate = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
        weights = list(packed.in_proj_weight.chunk(3)) if packed._qkv_same_embed_dim else separate
        trained = any(p.requires_grad for p in packed.parameters(recurse=False))
        bias = packed.in_proj_bias
        biases = [None] * 3 if bias is None else list(bias.chunk(3))
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, trained) for weight, bias in zip(weights, biases, strict=True)
        )
        out = packed.out_proj
        self.out_proj = _linear(out.weight, out.bias, out.weight.requires_grad)  # type: ignore[assignment]
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: ``[L, N, E]`` (``[N, L, E]`` if batch first) or ``[L, E]``.

        Raises:
            ValueError: where ``is_causal`` comes without the mask that it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched, first = query.dim() == 3, self.batch_first
        q, k, v = (
            self._heads(x if batched and first else x.transpose(0, 1) if batched else x[None])
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            mixed, weights = self._mix(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output if batched and first else output.transpose(0, 1) if batched else output[0]
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """``[N, L, E]`` to ``[N, heads, L, E / heads]``."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        if self.training and self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        return torch.matmul(weights, v), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores ``[N, heads, L, S]``; in masks of bools True may not take part."""
        found = None if attention is None else _additive(attention, q)
        if found is not None and found.dim() == 3:
            found = found.view(-1, self.num_heads, *found.shape[1:])
        if padding is None:
            return found
        columns = _additive(padding, q).view(-1, 1, 1, padding.shape[-1])
        return columns if found is None else found + columns


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return made


def _attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Torch's own attention by name; subclasses may compute something else."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }


def _calls(work: Work, modules: Collection[nn.Module]) -> dict[nn.Module, tuple[Any, Any, Any]]:
    """Arguments and output of the first call of each module, in one run of the batch."""
    found: dict[nn.Module, tuple[Any, Any, Any]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.setdefault(module, (args, kwargs, output))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        run(work.model, work.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(module: nn.Module, call: tuple[Any, Any, Any]) -> bool:
    args, kwargs, output = call
    wanted = list(tensors_in(output))
    try:
        found = list(tensors_in(module(*args, **kwargs)))
    except Exception:
        return False
    pairs = zip(wanted, found, strict=False)
    return len(wanted) == len(found) and all(difference(a, b) <= tolerance(_TOLERANCE, a) for a, b in pairs)


def unpack_attention(work: Work, excluded: Collection[str]) -> list[str] | None:
    """Replace each ``nn.MultiheadAttention`` by :class:`UnpackedAttention`.

    One that adds a bias or zeros to its keys (``add_bias_kv``, ``add_zero_attn``), that the batch
    does not reach or for which the replacement computes something else stays, with a note.

    Returns:
        Names that were left as they are, or None if nothing was replaced.
    """
    found = {name: module for name, module in _attentions(work.model).items() if name not in excluded}
    if not found:
        return None
    made = {n: UnpackedAttention(m) for n, m in found.items() if m.bias_k is None and not m.add_zero_attn}
    if not work.replay:
        calls = _calls(work, found.values())
        with reproducible(work.model):
            made = {n: m for n, m in made.items() if found[n] in calls and _same(m, calls[found[n]])}
    for name, module in made.items():
        work.model = replace(work.model, found[name], module)
    if made and not work.replay and not work.verifies(work.model, _TOLERANCE):
        for name, module in made.items():
            work.model = replace(work.model, module, found[name])
        made = {}
    left = [name for name in found if name not in made]
    if left and not work.replay:
        work.notes.append(f"attention with its projections packed, weights in float: {', '.join(left)}")
    return [*excluded, *left] if made else None
