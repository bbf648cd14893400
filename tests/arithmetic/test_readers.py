"""On which grids results are read, in networks where it can be told by looking."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.arithmetic.readers import Reading, grids_of, reading
from dqss.bundle import Bundle
from tests.points.test_points import WIDTH, Network, Residual, batch, bundle_for, conv


def read(model: nn.Module, inputs: Tensor) -> tuple[Reading, Bundle]:
    torch.manual_seed(0)
    model = model.eval()
    bundle = bundle_for(model, inputs)
    return reading(model, bundle, inputs), bundle


def test_what_comes_next_says_on_which_grid() -> None:
    seen, bundle = read(Network(Residual()), batch())
    wanted = {
        "stem": "blocks.0.first.activation",
        "blocks.0.first": "blocks.0.second.activation",
        "blocks.0.second": "blocks.0.point0.left",
        "blocks.0.point0": "point0.input",
        "point0": "head.activation",
    }
    assert set(seen.outputs) == set(wanted)
    for name, quantizer in wanted.items():
        assert torch.equal(seen.outputs[name].scale, grids_of(bundle, torch.device("cpu"))[quantizer].scale)
    assert seen.axes["stem"] == 4 and seen.axes["head"] == 2


class Twice(nn.Module):
    """One layer's output on two grids: with the rectifier and without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.left(F.relu(y)) + self.right(y - 1.0)


def test_what_something_else_reads_has_none() -> None:
    seen, bundle = read(Twice(), batch())
    # Its output is a point of its own, on which all that follow depend.
    assert "first" in bundle.strategy.points
    assert torch.equal(seen.outputs["first"].scale, bundle.tensors["first.output.scale"])
    assert "point0" not in seen.outputs  # the network's output


def test_watching_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model, inputs = Network(Residual()).eval(), batch()
    bundle = bundle_for(model, inputs)
    before = {name: type(module) for name, module in model.named_modules()}
    reading(model, bundle, inputs)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_width_is_part_of_a_grid() -> None:
    # The points of the target have eight bits; layers with fewer are no bytes.
    model, inputs = nn.Sequential(conv(), conv(WIDTH)).eval(), batch()
    bundle = bundle_for(model, inputs)
    choice = bundle.strategy.layers["1"].activation
    assert choice is not None
    narrow = bundle.strategy.layers["1"].model_copy(
        update={"activation": choice.model_copy(update={"bits": 4})}
    )
    strategy = bundle.strategy.model_copy(update={"layers": {**bundle.strategy.layers, "1": narrow}})
    assert "0" in reading(model, bundle, inputs).outputs
    tensors = {**bundle.tensors, "1.activation.zero_point": torch.zeros(1)}
    assert "0" not in reading(model, Bundle(strategy, tensors), inputs).outputs
