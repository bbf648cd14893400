"""How the probabilities of all options moved over a search, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dqss.decision import Decision
from dqss.io import StrPath, write_bytes_atomic

TRAJECTORY_FILE = "trajectory.safetensors"
POINTS = 64
"""About as many states are kept of a search, however long it is: a picture shows no more."""


class Trajectory:
    """Keeps the logits of all decisions every few steps.

    Which steps is a function of the number of steps planned alone, so that a resumed search keeps
    what the undisturbed one would have kept. One copy from the device a state, whatever the number
    of decisions.

    Args:
        decisions: all of a search.
        steps: planned.
    """

    def __init__(self, decisions: Sequence[Decision], steps: int) -> None:
        self._decisions = list(decisions)
        self.every = max(1, -(-steps // POINTS))
        self._done = 0
        self._states: dict[int, Tensor] = {}
        """All logits, one after the other, by the number of steps done."""

    def observe(self) -> None:
        """Count a step; to be called after the logits have moved."""
        self._done += 1
        if self._done % self.every == 0:
            self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the present logits, wherever the search stands."""
        self._states[self._done] = torch.cat([d.logits.detach() for d in self._decisions]).cpu()

    def probabilities(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the logits meant, see :meth:`dqss.decision.Decision.probabilities`.

        Returns:
            Numbers of steps done, ``[T]``, and ``[T, K]`` fp32 for each decision, by its name.
        """
        sizes = [len(decision.options) for decision in self._decisions]
        empty = torch.empty(0, sum(sizes))
        rows = torch.stack(list(self._states.values())) if self._states else empty
        found = {}
        for decision, logits in zip(self._decisions, torch.split(rows, sizes, dim=1), strict=True):
            outcome = decision.outcome.cpu()
            alike = (outcome[:, None] == outcome).float()
            found[decision.name] = torch.softmax(logits.float(), dim=1) @ alike
        return torch.tensor(list(self._states)), found

    def save(self, file: StrPath) -> None:
        """Write :meth:`probabilities`: ``steps``, and ``probabilities.NAME`` for each decision."""
        steps, found = self.probabilities()
        named = {f"probabilities.{name}": rows.contiguous() for name, rows in found.items()}
        write_bytes_atomic(file, safetensors.torch.save({"steps": steps, **named}))

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs, in plain containers."""
        return {"done": self._done, "states": dict(self._states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._done, self._states = int(state["done"]), dict(state["states"])
