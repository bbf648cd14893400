"""The costs that a supernet's options have: bytes, bits, operations, memory.

A tensor in float counts 32 bits a value. Decisions that rule several tensors (ties) cost what these
cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dqss.attach import original_weight
from dqss.budget.cost import Pair, PeakCost, SumCost
from dqss.budget.packing import BYTE, SCALE_BITS, Packing
from dqss.budget.workload import Workload, activations
from dqss.errors import BudgetError
from dqss.mixed import MixedQuantizer, MixedWeight
from dqss.quantizers import Quantizer
from dqss.supernet import Supernet

FLOAT_BITS = 32
MEGA = 1e6


def size(supernet: Supernet, packing: Packing, name: str) -> SumCost:
    """Bytes (in MB, a million) of the whole network at rest.

    Quantized weights as ``packing`` says, with their scales and zero points; a scale and a zero
    point for each channel of an activation; all else (biases, norms, layers in float) at four bytes.
    """
    single = _Table()
    for layer in weights(supernet):
        count = original_weight(layer.module).numel()
        single.add(layer.quantizer, lambda q, count=count: _stored(q, count, packing))  # type: ignore[misc]
    for _, quantizer in activations(supernet):
        single.add(quantizer, lambda q: q.channels * (SCALE_BITS + packing.width(q.candidate.spec)))
    return SumCost(name, "MB", single.found, constant=_kept(supernet) * FLOAT_BITS, divisor=BYTE * MEGA)


def average_weight_bits(supernet: Supernet) -> SumCost:
    """Mean width of the weights under search, each value counted alike."""
    single, total = _Table(), 0
    for layer in weights(supernet):
        count = original_weight(layer.module).numel()
        total += count
        single.add(layer.quantizer, lambda q, count=count: count * _width(q))  # type: ignore[misc]
    if not total:
        raise BudgetError("budget.average_weight_bits: no weight is under search")
    return SumCost("average_weight_bits", "bits", single.found, divisor=total)


def average_activation_bits(supernet: Supernet, workload: Workload) -> SumCost:
    """Mean width of the activations under search, each value for one input counted alike."""
    single, total = _Table(), 0
    for name, quantizer in activations(supernet):
        count = workload.elements.get(name, 0)
        total += count
        single.add(quantizer, lambda q, count=count: count * _width(q))  # type: ignore[misc]
    if not total:
        raise BudgetError("budget.average_activation_bits: no activation is under search")
    return SumCost("average_activation_bits", "bits", single.found, divisor=total)


def activation_memory(supernet: Supernet, workload: Workload) -> PeakCost:
    """Kilobytes (a thousand) of the largest tensor that some layer or product reads, for one input."""
    single = _Table(torch.maximum)
    for name, quantizer in activations(supernet):
        count = workload.elements.get(name, 0)
        single.add(quantizer, lambda q, count=count: count * _width(q))  # type: ignore[misc]
    return PeakCost("activation_memory_kb", "kB", single.found, divisor=BYTE * 1e3)


def bitops(supernet: Supernet, workload: Workload) -> SumCost:
    """Multiply-accumulates times the bits of both factors, for one input (HAWQ-v3, arXiv 2011.10680).

    Layers count whether they are under search or not; products of two activations count where they
    are.

    Raises:
        BudgetError: naming a layer whose work cannot be seen.
    """
    single, pairs = _Table(), _Pairs()
    for first, second, macs in _factors(supernet, workload):
        if first is None or second is None:
            single.add(_only(first, second), lambda q, macs=macs: macs * FLOAT_BITS * _width(q))  # type: ignore[misc]
        elif first.decision is second.decision:
            single.add(first, lambda q, macs=macs: macs * _width(q) ** 2)  # type: ignore[misc]
        else:
            pairs.add(first, second, macs * torch.outer(_bits(first), _bits(second)))
    searched = {*supernet.layers, *supernet.products}
    in_float = sum(count for name, count in workload.macs.items() if name not in searched)
    return SumCost("bitops", "", single.found, pairs.found(), constant=in_float * FLOAT_BITS**2)


class WeightOf:
    """A weight under search and a layer that has it."""

    def __init__(self, name: str, module: nn.Module, quantizer: MixedWeight) -> None:
        self.name, self.module, self.quantizer = name, module, quantizer


def weights(supernet: Supernet) -> Iterator[WeightOf]:
    """Every weight under search once, though several layers may have it."""
    seen: set[int] = set()
    for name, layer in supernet.layers.items():
        if layer.weight is not None and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            yield WeightOf(name, layer.module, layer.weight)


class _Table:
    """Costs by decision, added up over the tensors that it rules."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        self.found: dict[str, Tensor] = {}
        self._join = join

    def add(self, quantizer: MixedQuantizer, cost: Callable[[Quantizer], float]) -> None:
        values = [cost(quantizer[k]) for k in range(len(quantizer.candidates))]
        row, name = torch.tensor(values, dtype=torch.float64), quantizer.decision.name
        self.found[name] = self._join(self.found[name], row) if name in self.found else row


class _Pairs:
    """Tables of pairs of decisions, added up."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str], Tensor] = {}

    def add(self, first: MixedQuantizer, second: MixedQuantizer, table: Tensor) -> None:
        key = (first.decision.name, second.decision.name)
        if key[::-1] in self._tables:
            key, table = key[::-1], table.T
        self._tables[key] = self._tables[key] + table if key in self._tables else table

    def found(self) -> tuple[Pair, ...]:
        return tuple(Pair(first, second, table) for (first, second), table in self._tables.items())


def _only(first: MixedQuantizer | None, second: MixedQuantizer | None) -> MixedQuantizer:
    found = first or second
    assert found is not None  # a layer under search has a decision for its weight or its input
    return found


def _width(quantizer: Quantizer) -> int:
    return quantizer.candidate.spec.bits


def _bits(quantizer: MixedQuantizer) -> Tensor:
    widths = [_width(quantizer[k]) for k in range(len(quantizer.candidates))]
    return torch.tensor(widths, dtype=torch.float64)


def _stored(quantizer: Quantizer, count: int, packing: Packing) -> int:
    shifted = bool(quantizer.grid().zero_point.any())
    return packing.bits_of(quantizer.candidate.spec, count, quantizer.channels, shifted)


def _factors(
    supernet: Supernet, workload: Workload
) -> Iterator[tuple[MixedQuantizer | None, MixedQuantizer | None, int]]:
    """What is multiplied with what, and how often."""
    for name, layer in supernet.layers.items():
        macs = workload.macs.get(name, 0)
        if not macs:
            raise BudgetError(
                f"budget.bitops: the work of layer {name!r} cannot be counted, its forward is never called: "
                "skip it in the search space, or set another limit"
            )
        yield layer.weight, layer.activation, macs
    for name, product in supernet.products.items():
        operands = dict(product.operands())
        total = workload.macs.get(name, 0)
        if product.quantizer.kind == "matmul":
            yield operands["left"], operands["right"], total
            continue
        # Scores take a query's length for each, the sum over values a value's: E against V.
        keys, values = (workload.elements[f"{name}.{operand}"] for operand in ("key", "value"))
        scores = total * keys // (keys + values)
        yield operands["query"], operands["key"], scores
        yield operands["probabilities"], operands["value"], total - scores


def _kept(supernet: Supernet) -> int:
    """Values that stay in float whatever is decided."""
    ours: set[int] = set()
    for module in supernet.model.modules():
        if isinstance(module, MixedQuantizer):
            ours.update(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
    replaced = {id(original_weight(layer.module)) for layer in weights(supernet)}
    replaced -= _held_elsewhere(supernet)
    tensors = [*supernet.model.parameters(), *supernet.model.buffers()]
    return sum(
        tensor.numel()
        for tensor in tensors
        if tensor.is_floating_point() and id(tensor) not in ours and id(tensor) not in replaced
    )


def _held_elsewhere(supernet: Supernet) -> set[int]:
    """Parameters that some module reads in float: an embedding tied to a layer keeps its own values."""
    return {
        id(parameter)
        for module in supernet.model.modules()
        if not isinstance(module, ParametrizationList)
        for parameter in module._parameters.values()
        if parameter is not None
    }
