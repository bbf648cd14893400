"""Study: what would a scale for each channel gain at eight bits? See README.md here.

    python -m experiments.sr_rlfn.channels --data FOLDER

Only inputs are rounded, in a network that is otherwise float. ``tensor``: one scale for each input;
``channel``: one for each channel; ``divided``: one for all channels, each divided by its largest value before
and multiplied afterwards, which is what the best smoothing could do if every input could be smoothed by
itself. Rows are appended to channels.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.functional import broadcast_channels, channel_view, fake_quantize
from dqss.lit.settings import PTQSettings
from dqss.observers import Statistics
from dqss.observers.minmax import MinMax
from dqss.observers.mse import MSE
from dqss.spec import PerChannel, QuantSpec
from experiments.harness import Table, quiet, study_parser
from experiments.sr_rlfn.run import Study

HERE = Path(__file__).parent
SAMPLE = 1 << 16
OBSERVERS = {"mse": MSE(), "minmax": MinMax()}
SCALES = ("tensor", "channel", "divided")
TWO = ("upsampler.0", "conv_2")
"""Inputs that lose most."""


class Inputs:
    """Of all layers, for the patches; and what rounds them."""

    def __init__(self, study: Study, patch: int) -> None:
        self.study, self.layers = study, {}
        self.seen: dict[str, Tensor] = {}
        for name, module in study.model.named_modules():
            if isinstance(module, nn.Conv2d):
                self.layers[name] = module
        handles = [m.register_forward_pre_hook(self._keep(n)) for n, m in self.layers.items()]
        study.model(study.patches(0, patch).batch(range(26)))
        for handle in handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen[name] = args[0].clone()

        return hook

    def rounding(self, name: str, scales: str, clip: str) -> Callable[..., Tensor]:
        """A hook that rounds the input of a layer to eight bits."""
        x, size = self.seen[name], torch.ones(1)
        if scales == "divided":
            size = x.abs().amax((0, 2, 3)).clamp(min=1e-3).reshape(-1, 1, 1)
        spec = QuantSpec(8, symmetric=False)
        if scales == "channel":
            spec = replace(spec, granularity=PerChannel(1))
        rows = channel_view(x / size, spec.granularity)
        stats = Statistics.of(rows[:, :: max(1, rows.shape[1] // SAMPLE)])
        stats = replace(stats, minimum=rows.amin(1), maximum=rows.amax(1))
        grid = OBSERVERS[clip].qparams(stats, spec)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            scaled = args[0] / size
            scale, zero_point = (broadcast_channels(part, scaled.shape, spec.granularity) for part in grid)
            return fake_quantize(scaled, scale, zero_point, spec) * size

        return hook

    @contextmanager
    def rounded(self, names: Sequence[str], scales: str, clip: str) -> Any:
        """The network with these inputs rounded."""
        hooks = {name: self.rounding(name, scales, clip) for name in names}
        handles = [self.layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        yield
        for handle in handles:
            handle.remove()


@torch.no_grad()
def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "channels.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--patch", type=int, nargs="+", default=[32, 64])
    arguments = parser.parse_args()
    quiet(arguments.threads)
    table = Table(arguments.out, ("patch", "inputs", "scales", "clip", "loss"), 4)
    study = Study(arguments.data, PTQSettings())
    reference = study.psnr(study.model, "Set5")
    for patch in arguments.patch:
        inputs = Inputs(study, patch)
        groups = {"all": list(inputs.layers), **{name: [name] for name in TWO}}
        for name, scales, clip in product(groups, SCALES, OBSERVERS):
            if not table.has(patch, name, scales, clip) and (name == "all" or clip == "mse"):
                with inputs.rounded(groups[name], scales, clip):
                    table.add(patch, name, scales, clip, reference - study.psnr(study.model, "Set5"))


if __name__ == "__main__":
    main()
