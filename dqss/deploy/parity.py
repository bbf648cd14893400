"""Does a file give the simulation's answers? Measured in ONNX Runtime, on inputs of the user's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from dqss.calls import call_model, first_tensor, tensors_in
from dqss.deploy.compared import PartParity, Seen, Total, Whole
from dqss.deploy.cut import cut, given
from dqss.deploy.function import tensors_of
from dqss.deploy.grids import Array, dtype_of
from dqss.deploy.lower import Lowered
from dqss.deploy.marks import Marked
from dqss.deploy.runtime import feeds_of, open_session, run_session
from dqss.deploy.trace import Signature
from dqss.errors import DataError


class Comparison:
    """A lowered graph in ONNX Runtime beside the simulation.

    Args:
        marked: runs the simulation, and keeps its codes.
        signature: names of inputs and outputs.
        threads: of the runtime.
    """

    def __init__(self, marked: Marked, signature: Signature, threads: int) -> None:
        self.marked, self.signature, self.threads = marked, signature, threads

    @torch.no_grad()
    def whole(
        self,
        data: bytes,
        exact: nn.Module,
        batches: Iterable[Any],
        seen: Seen | None = None,
        fake: nn.Module | None = None,
    ) -> tuple[Whole, Whole | None]:
        """The whole network over ``batches``; ``seen`` is called with both outputs of each.

        ``exact`` is the float network, ``fake`` the fake-quantized one, where the simulation is another.

        Returns:
            The file beside the simulation, and the simulation beside ``fake`` (None without it).
        """
        session, total = open_session(data, self.threads), Whole()
        distance = None if fake is None else Whole()
        for batch in batches:
            outputs = call_model(self.marked, batch)
            wanted = first_tensor(outputs)
            position = next(i for i, output in enumerate(tensors_in(outputs)) if output is wanted)
            feeds = feeds_of(self.signature.inputs, tensors_of(batch))
            found = torch.from_numpy(run_session(session, feeds)[self.signature.outputs[position]])
            count, reference = len(tensors_of(batch)[0]), first_tensor(call_model(exact, batch))
            total.add(count, reference, wanted, found)
            if fake is not None and distance is not None:
                distance.add(count, reference, first_tensor(call_model(fake, batch)), wanted)
            if seen is not None:
                seen(wanted, found)
        if total.count == 0:
            raise DataError("an export needs inputs to be compared on: give some, as the network takes them")
        return total, distance

    @torch.no_grad()
    def parts(self, model: ir.Model, lowered: Lowered, batches: Iterable[Any]) -> list[PartParity]:
        """Every part of the network, fed the simulation's integers."""
        names = {call: str(value.name) for call, value in lowered.codes.items()}
        severed, parts = cut(model, names)
        session = open_session(ir.to_proto(severed).SerializeToString(), self.threads)
        totals = {part.output: Total() for part in parts}
        for batch in batches:
            with self.marked.notes.keeping_codes():
                outputs = list(tensors_in(call_model(self.marked, batch)))
                codes = dict(self.marked.notes.codes or {})
            wanted: dict[str, Array] = dict(
                zip(self.signature.outputs, (x.numpy() for x in outputs), strict=True)
            )
            feeds = feeds_of(self.signature.inputs, tensors_of(batch))
            for call, name in names.items():
                held = lowered.held[call[0]]
                wanted[name] = (codes[call].numpy() + held.offset).astype(dtype_of(held.container))
                feeds[given(name)] = wanted[name]
            found = run_session(session, feeds)
            for part in parts:
                totals[part.output].add(wanted[part.output], found[part.output], part.call is not None)
        return [totals[part.output].result(part) for part in parts]
