"""From a user's network to the canonical float network, by a recipe that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from dqss.attach import forbid_nested
from dqss.calls import tensors_in
from dqss.errors import ModelError, StrategyError, near_match
from dqss.prepare.equalize import equalize
from dqss.prepare.fold import fold_batch_norm
from dqss.prepare.hashing import check_finite, combine, digests
from dqss.prepare.modules import copy_model, unwrap, unwrap_children
from dqss.prepare.parametrizations import bake_parametrizations
from dqss.prepare.reparameterize import reparameterize
from dqss.prepare.smooth import smooth
from dqss.prepare.standardize import bake_weight_standardization
from dqss.prepare.unpack_attention import unpack_attention
from dqss.prepare.work import Bits, Work, eight, run

Step: TypeAlias = Callable[[Work, Collection[str]], "list[str] | None"]


def _leaving(step: Step) -> Step:
    """A step whose recorded words name what it left out: ``-name``."""

    def run_step(work: Work, words: Collection[str]) -> list[str] | None:
        left = step(work, [word.removeprefix("-") for word in words])
        return None if left is None else [f"-{name}" for name in left]

    return run_step


STEPS: dict[str, Step] = {
    "bake_parametrizations": _leaving(bake_parametrizations),
    "bake_weight_standardization": _leaving(bake_weight_standardization),
    "reparameterize": _leaving(reparameterize),
    "unpack_attention": _leaving(unpack_attention),
    "fold_batch_norm": fold_batch_norm,
    "equalize": equalize,
    "smooth": smooth,
}
OPTIONAL = frozenset({"equalize", "smooth"})
"""Steps that are made only where they are asked for: the network could be searched without them."""
_TOLERANCE = 2e-3  # of the whole: reparameterize alone may use half of it


@dataclass(frozen=True)
class Prepared:
    """The canonical float network and how it came about.

    Attributes:
        model: in eval mode; shares nothing with the user's network.
        recipe: the steps that changed something, in order: a name, then what it left out
            (``"reparameterize -stem"``) or what it did: batch norms that were folded
            (``"fold_batch_norm conv1>bn1"``), chains that were equalized (``"equalize conv1>conv2"``),
            groups that were smoothed, with the exponents of their factors (``"smooth conv1>conv2:0,-3,5"``).
        fingerprints: 16 hex digits for each tensor of the original network.
        weights_sha256: hash of all weights of the original network.
        notes: what was left as it is, and why.
    """

    model: nn.Module
    recipe: list[str]
    fingerprints: dict[str, str]
    weights_sha256: str
    notes: list[str]


def _nothing_skipped(name: str) -> bool:
    return False


def _parse(recipe: Sequence[str]) -> list[tuple[str, list[str]]]:
    parsed = []
    for entry in recipe:
        name, *words = entry.split(" ") if entry else [""]
        if name not in STEPS:
            raise StrategyError(
                f"unknown preparation step {name!r}{near_match(name, STEPS)}; this version of dqss knows: "
                f"{', '.join(STEPS)}"
            )
        parsed.append((name, words))
    return parsed


def _copy(model: nn.Module) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript model cannot be searched: give the nn.Module it was made from")
    check_finite(model)
    try:
        with torch.no_grad():
            copied = copy_model(model)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {_first_line(error)}") from error
    unwrap_children(copied)
    forbid_nested(copied)
    return copied.eval()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _start(model: nn.Module, inputs: Any, skip: Callable[[str], bool], replay: bool) -> Work:
    copied = _copy(model)
    try:
        output = run(copied, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} fails on the batch: {_first_line(error)}; a mapping is passed as "
            "keyword arguments, a tuple or list as positional ones, anything else as the only argument"
        ) from error
    return Work(copied, inputs, [tensor.clone() for tensor in tensors_in(output)], skip, replay)


def prepare(
    model: nn.Module,
    inputs: Any,
    recipe: Sequence[str] | None = None,
    skip: Callable[[str], bool] = _nothing_skipped,
    without: Collection[str] = (),
    optional: Collection[str] = (),
    bits: Bits = eight,
) -> Prepared:
    """Make the canonical float network that search, apply and export start from.

    Args:
        model: any network; it is copied and never changed. ``DataParallel`` and ``torch.compile``
            wrappers are taken off.
        inputs: one batch, as :func:`dqss.calls.call_model` takes it. A small one is enough.
        recipe: the recorded recipe to repeat exactly, whatever the batch; None to find one.
        skip: says which layers will not be searched, by name. Only those may be nonlinear in
            their weight.
        without: steps that are left out where a recipe is to be found: training may want the batch
            norms where they are.
        optional: steps of :data:`OPTIONAL` that are made too.
        bits: of the weight and the input of a layer, by its name, which ``smooth`` tries factors with;
            None for what stays in float.

    Raises:
        NonFiniteError: for NaN or infinity in the weights, naming the tensors.
        ModelError: for a model that cannot run on the batch or a layer that cannot be searched.
        StrategyError: for a step in ``recipe`` that this version does not know.
    """
    model = unwrap(model)
    found = [(name, list[str]()) for name in STEPS if name not in {*without, *(OPTIONAL - set(optional))}]
    steps = found if recipe is None else _parse(recipe)
    work = _start(model, inputs, skip, replay=recipe is not None)
    work.bits = bits
    done = []
    for name, words in steps:
        recorded = STEPS[name](work, words)
        if recorded is not None:
            done.append(" ".join([name, *recorded]))
    if recipe is None and done and not work.verifies(work.model, _TOLERANCE):
        raise ModelError(
            f"{type(model).__name__}: preparing it ({', '.join(done)}) changed its output by "
            f"{work.error(work.model):.1g}; give it with plain weights and folded batch norms"
        )
    each = digests(model)
    return Prepared(
        model=work.model.eval(),
        recipe=done if recipe is None else list(recipe),
        fingerprints={name: value[:16] for name, value in each.items()},
        weights_sha256=combine(each),
        notes=work.notes,
    )
