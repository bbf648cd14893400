"""Which of the meetings that a pass has shown need points, which layers' outputs, and what reads what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dqss.points.watch import Seen, Value
from dqss.products.find import Place


@dataclass(frozen=True)
class Plan:
    """Where points are needed.

    Attributes:
        places: meetings whose operands are to be quantized, in the order of their first call.
        outputs: layers whose output is.
        hidden: meetings that nothing can be put around.
        readers: for everything that is quantized, by its name, what it reads, call by call: the same
            values for those that read the same tensors.
    """

    places: tuple[Place, ...]
    outputs: tuple[str, ...]
    hidden: tuple[Place, ...]
    readers: dict[str, tuple[Value, ...]]


def plan(seen: Seen, searchable: Callable[[Place], bool]) -> Plan:
    """Quantize every followed output before anything that no kernel takes in.

    A meeting counts where an operand comes out of a layer that is followed, or of a meeting that counts:
    all its operands are quantized, so that it can be computed in integers. What is left, layers whose
    output is read otherwise or by nothing that can be seen, needs a point there.

    Args:
        seen: of one pass.
        searchable: whether something can be put around a meeting.
    """
    wanted: dict[Place, None] = {}
    hidden: dict[Place, None] = {}
    grown = -1
    while grown != len(wanted) + len(hidden):
        grown = len(wanted) + len(hidden)
        for meet in seen.meetings:
            if any(value.ends or value.places & wanted.keys() for value in meet.operands.values()):
                (wanted if searchable(meet.place) else hidden)[meet.place] = None
    bare = {value for meet in seen.meetings if meet.place in hidden for value in meet.operands.values()}
    loose = (value for value in seen.values if value.bare or not value.read or value in bare)
    ends = {name for value in loose for name in value.ends}
    outputs = tuple(name for name in seen.outputs if name in ends)
    readers = {f"{name}.activation": tuple(values) for name, values in seen.readers.items()}
    for meet in seen.meetings:
        for name, value in meet.operands.items() if meet.place in wanted else ():
            readers[f"{meet.place.name}.{name}"] = (*readers.get(f"{meet.place.name}.{name}", ()), value)
    readers |= {f"{name}.output": tuple(seen.outputs[name]) for name in outputs}
    return Plan(tuple(wanted), outputs, tuple(hidden), readers)


def of_one_tensor(readers: dict[str, tuple[Value, ...]], names: Iterable[str]) -> list[list[str]]:
    """Those of ``names`` that read the same tensors in every call, in groups of two or more."""
    groups: dict[tuple[Value, ...], list[str]] = {}
    for name in names:
        if name in readers:
            groups.setdefault(readers[name], []).append(name)
    return [group for group in groups.values() if len(group) > 1]
