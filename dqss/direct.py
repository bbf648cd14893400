"""Compiled code called without what comes before it: guards, wrappers and checks of its arguments.

Around a launch, ``torch.compile`` looks up which of its forms fits, wraps and unwraps tensors, and keeps
records. For a small tensor that takes ten times as long as the launch itself, and between large convolutions,
which leave nothing of Python in the caches, still longer. What it comes to depends on shapes, types and
device alone. So the first call with these is watched, and what it led to is called at once ever after.

This reaches into the compiler; where it does not find what it expects, nothing is taken from it and calls go
the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]
_OTHERS = 2
"""What a key says beside the arguments."""


def key_of(args: Sequence[Tensor]) -> Key | None:
    """What compiled code depends on; None for arguments that are best left to the compiler's own checks."""
    if torch._C._len_torch_dispatch_stack():
        return None
    described = [(arg.shape, arg.dtype) for arg in args if arg.is_contiguous()]
    key = (torch.get_num_threads(), args[0].device, *described)
    return key if len(key) == len(args) + _OTHERS else None


@dataclass(frozen=True)
class Direct:
    """Compiled code for arguments of one key.

    Attributes:
        owner: what keeps the code alive.
        code: takes a list of tensors and sizes, and gives the results.
        sizes: what it takes beside the arguments.
        order: picks its list out of the arguments and these.
        single: whether there is one result, which is not in a tuple.
    """

    owner: Any
    code: Callable[[list[Any]], Sequence[Tensor]]
    sizes: tuple[int, ...]
    order: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    single: bool

    def __call__(self, args: tuple[Tensor, ...]) -> Any:
        """What the compiled function gives for ``args``."""
        found = self.code(list(self.order(args + self.sizes)))
        return found[0] if self.single else tuple(found)


@dataclass(frozen=True)
class _Call:
    graph: Any
    given: list[Any]
    found: Sequence[Any]

    def direct(self, args: Sequence[Tensor], result: Any) -> Direct | None:
        """The same call without what led to it, if that is nothing but a matter of order."""
        results = [result] if isinstance(result, Tensor) else list(result)
        if len(results) != len(self.found) or any(
            a is not b for a, b in zip(results, self.found, strict=True)
        ):
            return None
        where = {id(arg): position for position, arg in enumerate(args)}
        order, sizes = [], list[int]()
        for each in self.given:
            if type(each) is int:
                order.append(len(args) + len(sizes))
                sizes.append(each)
            elif id(each) in where:
                order.append(where[id(each)])
            else:
                return None
        if len(order) < 2:  # itemgetter gives no tuple then
            return None
        single = isinstance(result, Tensor)
        return Direct(self.graph, self.graph.current_callable, tuple(sizes), itemgetter(*order), single)


def watched(function: Callable[..., Any], args: Sequence[Tensor]) -> tuple[Any, Direct | None]:
    """Call a compiled function, and find out how to call what it led to."""
    with _calls() as calls:
        result = function(*args)
    return result, calls[0].direct(args, result) if len(calls) == 1 else None


@contextmanager
def _calls() -> Iterator[list[_Call]]:
    """Calls of compiled graphs made inside."""
    calls: list[_Call] = []
    kind = _graphs()
    if kind is None:
        yield calls
        return
    own = kind.__call__

    def call(graph: Any, inputs: Sequence[Any]) -> Any:
        given = list(inputs)  # which it empties
        found = own(graph, inputs)
        calls.append(_Call(graph, given, found))
        return found

    kind.__call__ = call
    try:
        yield calls
    finally:
        kind.__call__ = own


def _graphs() -> Any:
    """The class of compiled graphs, where this version of torch has one as known here."""
    try:
        from torch._inductor.output_code import CompiledFxGraph
    except ImportError:
        return None
    return CompiledFxGraph if "current_callable" in CompiledFxGraph.__annotations__ else None
