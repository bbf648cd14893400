"""What networks cost, against counts made another way: by hand, from tensors, from an exported file."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import dqss
from dqss.budget import costs
from dqss.budget.packing import EXPORTED, PACKED
from dqss.budget.workload import watch
from dqss.deploy.containers import WEIGHT_WIDTHS
from dqss.errors import BudgetError
from dqss.functional import channel_count
from dqss.mixed import MixedActivation, MixedWeight
from tests.support.nets import (
    bundle_of,
    calibrated,
    cnn,
    every_other,
    images,
    prepared_supernet,
    small_space,
)

MIXED = small_space([3, 8, 4, 16], weight_granularity=["tensor", "channel", "group"], weight_group_size=4)


def test_macs_and_elements_are_those_of_the_shapes() -> None:
    supernet = calibrated(cnn(), images(4))
    workload = watch(supernet, images(1))
    assert workload.macs == {"0": 6 * 36 * 27, "3": 6 * 4 * 9, "6": 24 * 4}
    assert workload.elements == {"0.activation": 3 * 36, "3.activation": 6 * 36, "6.activation": 24}
    # The pass leaves nothing behind: another one counts the same.
    assert watch(supernet, images(1)) == workload


class Attention(nn.Module):
    """Queries by keys, then probabilities by values of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.embed(x)
        return nn.functional.scaled_dot_product_attention(q, q.clone(), x.clone())


def test_the_two_products_of_an_attention_are_told_apart() -> None:
    supernet = calibrated(Attention(), images(2, 7, 5), space=small_space([4, 8], products=True))
    workload = watch(supernet, images(1, 7, 5))
    assert workload.macs == {"embed": 7 * 5 * 8, "product0": 7 * 7 * 8 + 7 * 7 * 5}
    cost = costs.bitops(supernet, workload)
    widths = {"embed.weight": 4, "embed.activation": 8, "product0.query": 4, "product0.key": 8}
    widths |= {"product0.probabilities": 8, "product0.value": 4}
    assignment = {
        name: [option.spec.bits for option in supernet.decisions[name].options].index(bits)
        for name, bits in widths.items()
    }
    assert cost.of(assignment) == 280 * 32 + 392 * 32 + 245 * 32


def test_bitops_count_layers_in_float_and_weights_alone() -> None:
    model, batch = cnn(), images(4)
    supernet = calibrated(model, batch, space=small_space([2, 5], skip=["3"]))
    cost = costs.bitops(supernet, watch(supernet, batch[:1]))
    for start in range(4):
        assignment = every_other(supernet, start)
        bits = {n: supernet.decisions[n].options[k].spec.bits for n, k in assignment.items()}
        work = {"0": 6 * 36 * 27, "6": 24 * 4}
        searched = sum(macs * bits[f"{n}.weight"] * bits[f"{n}.activation"] for n, macs in work.items())
        assert cost.of(assignment) == searched + 6 * 4 * 9 * 32 * 32


class Reads(nn.Module):
    """Uses a layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.read.weight)


def test_work_that_cannot_be_seen_is_refused() -> None:
    supernet = calibrated(Reads(), images(3, 4))
    with pytest.raises(BudgetError, match=r"'read'.*skip it"):
        costs.bitops(supernet, watch(supernet, images(1, 4)))


@pytest.mark.parametrize("start", range(3))
def test_average_bits_are_weighted_by_values(start: int) -> None:
    supernet = calibrated(cnn(), images(4), space=MIXED)
    workload, assignment = watch(supernet, images(1)), every_other(supernet, start)
    for kind, cost in (
        (MixedWeight, costs.average_weight_bits(supernet)),
        (MixedActivation, costs.average_activation_bits(supernet, workload)),
    ):
        total = count = 0
        for name, layer in supernet.layers.items():
            quantizer = layer.weight if kind is MixedWeight else layer.activation
            assert quantizer is not None
            shape = layer.module.weight.shape
            values = shape.numel() if kind is MixedWeight else workload.elements[f"{name}.activation"]
            total += values * quantizer[assignment[quantizer.decision.name]].candidate.spec.bits
            count += values
        assert cost.of(assignment) == total / count


@pytest.mark.parametrize("start", range(4))
def test_size_is_that_of_packed_codes_scales_and_zero_points(start: int) -> None:
    space = small_space([3, 8, 4], weight_granularity=["channel", "group"], weight_symmetric=[True, False])
    prepared, supernet = prepared_supernet(cnn(), images(4), space)
    assignment = every_other(supernet, start)
    bits = 32 * sum(module.bias.numel() for module in prepared.model.modules() if hasattr(module, "bias"))
    for layer in supernet.layers.values():
        weight, activation = layer.weight, layer.activation
        assert weight is not None and activation is not None
        chosen = weight[assignment[weight.decision.name]]
        spec, shape = chosen.candidate.spec, layer.module.weight.shape
        scales = channel_count(shape, spec.granularity)
        assert len(chosen.scale) == scales
        zeros = 0 if spec.symmetric else scales
        bits += 8 * -(-shape.numel() * spec.bits // 8) + 32 * scales + 8 * -(-zeros * spec.bits // 8)
        bits += 32 + activation[assignment[activation.decision.name]].candidate.spec.bits
    found = costs.size(supernet, PACKED, "size_mb").of(assignment)
    assert found == pytest.approx(bits / 8e6, rel=1e-12)


def test_a_float_network_that_is_all_skipped_but_one_layer_keeps_its_bytes() -> None:
    model = cnn()
    supernet = calibrated(model, images(4), space=small_space(8, skip=["0", "3"]))
    cost = costs.size(supernet, PACKED, "size_mb")
    floats = sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    weight = model[6].weight.numel()
    assert cost.constant == 32 * (floats - weight)
    assert cost.of(every_other(supernet)) * 8e6 == cost.constant + 8 * weight + 4 * 32 + 32 + 8


def test_a_weight_that_an_embedding_reads_too_is_kept_in_float_as_well() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    supernet = calibrated(Tied(), torch.arange(6).reshape(2, 3), space=small_space(8))
    cost = costs.size(supernet, PACKED, "size_mb")
    assert cost.constant == 32 * 40
    assert cost.of(every_other(supernet)) * 8e6 == 32 * 40 + 8 * 40 + 10 * 32 + 32 + 8


def test_the_exported_widths_are_those_of_the_exporter() -> None:
    assert EXPORTED.widths == WEIGHT_WIDTHS


@pytest.mark.parametrize("start", range(3))
def test_size_as_exported_is_what_the_file_holds_for_its_weights(start: int, tmp_path: Path) -> None:
    """Codes, scales and zero points of every weight in the file, byte for byte."""
    torch.manual_seed(start)
    model, batch = (
        nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7)).eval(),
        images(8),
    )
    space = small_space(
        [2, 4, 7, 8, 12], weight_symmetric=[True, False], weight_granularity=["channel", "tensor", "group"]
    )
    prepared, supernet = prepared_supernet(model, batch, space)
    assignment = every_other(supernet, 11 * start)
    bundle = bundle_of(prepared, supernet, assignment, batch)
    path = tmp_path / "model.onnx"
    dqss.export_model(model, bundle, path, batch, exact=False)
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    held = {
        name: len(stored[name].raw_data)
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
        for name in node.input
    }
    cost = costs.size(supernet, EXPORTED, "exported_size_mb")
    names = [layer.weight.decision.name for layer in supernet.layers.values() if layer.weight is not None]
    counted = sum(float(cost.single[name][assignment[name]]) for name in names) / 8
    assert sum(held.values()) == counted


def test_activation_memory_is_that_of_the_largest_input() -> None:
    supernet = calibrated(cnn(), images(4), space=small_space([4, 8]))
    cost = costs.activation_memory(supernet, watch(supernet, images(1)))
    four = {name: 0 for name in supernet.decisions}
    assert cost.of(four) == 6 * 36 * 4 / 8e3
    wide = next(k for k, o in enumerate(supernet.decisions["0.activation"].options) if o.spec.bits == 8)
    assert cost.of({**four, "0.activation": wide}) == 6 * 36 * 4 / 8e3  # as large as the other at four
    assert cost.of({**four, "3.activation": wide}) == 6 * 36 * 8 / 8e3
