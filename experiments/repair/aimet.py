"""AIMET's AdaRound on MobileNetV2 at W4A8, first and last layer at 8 bits: see README.md here.

    python -m experiments.repair.aimet --data FOLDER --checkpoint FILE

It needs an environment of its own, with ``aimet-torch`` beside dqss. It is given the network with its batch
norms folded, as dqss folds them, and the images that dqss calibrates with: all 256, and those 205 that a
search with seed 0 sees (``_205``). Rows are appended to aimet.csv; rows that are there already are not
computed again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dqss.lit.device import device_of
from dqss.lit.settings import PTQSettings
from dqss.precision import full_precision
from dqss.prepare import prepare
from dqss.samples import Samples, split
from experiments.harness import Table, add_accelerator, quiet
from experiments.imagenet_mobile.run import Network

HERE = Path(__file__).parent
COLUMNS = (
    "row", "iterations", "images", "activations", "scheme", "kl", "top1",
    "gain", "gain_low", "gain_high", "seconds"
)  # fmt: skip
WEIGHT_BITS, ACTIVATION_BITS, EDGE_BITS = 4, 8, 8
EDGES = ("conv_stem", "classifier")
CONFIG = "default"
"""Its alias of AIMET's own rules with weights per channel and symmetric."""
BATCH = 32
"""Of AIMET's AdaRound, where it is a constant, and of calibration."""
WEIGHT_SCHEME = "tf_enhanced"
"""How AdaRound sets the clip range of weights unless told otherwise: the best ratio of signal to noise."""
SCHEMES = ("tf", "tf_enhanced")
"""Of activations; the first, from the least to the largest value, is what AIMET does by default."""
PLACES = ("own", "inputs")
"""Which activations are quantized: AIMET's own choice, outputs of nearly every operation; or what dqss
quantizes, the inputs of convolutions and linear layers."""


def only_inputs(network: nn.Module) -> None:
    """Quantize the inputs of convolutions and linear layers, and no other activation."""
    from aimet_torch.nn import QuantizedConv2d, QuantizedLinear

    quantizer = network.get_submodule("classifier").output_quantizers[0]
    for module in network.modules():
        if hasattr(module, "output_quantizers"):
            kept = isinstance(module, QuantizedConv2d | QuantizedLinear)
            for place in range(len(module.output_quantizers)):
                module.output_quantizers[place] = None
            for place in range(len(module.input_quantizers)):
                module.input_quantizers[place] = copy.deepcopy(quantizer) if kept else None


@dataclass
class Work:
    """A float network that AIMET can trace, its calibration images, where both go, and a folder for files."""

    network: nn.Module
    images: Tensor
    device: torch.device
    folder: Path

    @property
    def example(self) -> Tensor:
        """One input."""
        return self.images[:1].to(self.device)

    def adaround(self, iterations: int) -> tuple[nn.Module, str]:
        """Its weights rounded by AdaRound, and the file with their grids."""
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
        from aimet_torch.common.defs import QuantScheme

        batches = DataLoader(list(self.images), batch_size=BATCH)  # type: ignore[arg-type]
        modules = dict(self.network.named_modules())
        rounded = Adaround.apply_adaround(
            self.network,
            self.example,
            AdaroundParameters(batches, len(batches), iterations, forward_fn=self._forward),
            path=str(self.folder),
            filename_prefix="weights",
            default_param_bw=WEIGHT_BITS,
            param_bw_override_list=[(modules[name], EDGE_BITS) for name in EDGES],
            default_quant_scheme=QuantScheme.from_str(WEIGHT_SCHEME),
            default_config_file=CONFIG,
        )
        return rounded, str(self.folder / "weights.encodings")

    def simulate(self, network: nn.Module, place: str, scheme: str, grids: str | None) -> nn.Module:
        """The quantized network, whose weights have ``grids``, or AIMET's own of that many bits."""
        from aimet_torch.quantsim import QuantizationSimModel

        simulated = QuantizationSimModel(
            network,
            self.example,
            quant_scheme=scheme,
            default_output_bw=ACTIVATION_BITS,
            default_param_bw=WEIGHT_BITS,
            config_file=CONFIG,
        )
        if place == "inputs":
            only_inputs(simulated.model)
        for name in EDGES:
            simulated.model.get_submodule(name).param_quantizers["weight"].bitwidth = EDGE_BITS
        if grids is not None:
            simulated.set_and_freeze_param_encodings(grids)
        with torch.no_grad():
            simulated.compute_encodings(self._run)
        found: nn.Module = simulated.model
        return found.eval()

    def _run(self, network: nn.Module) -> None:
        for batch in self.images.split(BATCH):
            self._forward(network, batch)

    def _forward(self, network: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = network(batch.to(self.device))
        return found


@contextmanager
def work(network: Network, samples: Samples, device: torch.device) -> Iterator[Work]:
    """AIMET's form of the network: additions are modules."""
    from aimet_torch.model_preparer import prepare_model

    images: Tensor = samples.batch(range(len(samples)))
    folded = prepare(network.model, images[:2]).model
    traced = prepare_model(folded).eval()
    with torch.no_grad():
        assert torch.equal(traced(images[:2].clone()), folded(images[:2].clone()))
    with tempfile.TemporaryDirectory() as folder:
        yield Work(traced.to(device), images, device, Path(folder))


@full_precision()
def fill(table: Table, network: Network, iterations: int, samples: Samples, device: torch.device) -> None:
    """The rows that are missing, of so many iterations (0: nearest codes) on these images."""
    count = len(samples)
    row = "adaround" if iterations else "nearest"
    keys = [(row, iterations, count, place, scheme) for scheme in SCHEMES for place in PLACES]
    missing = [key for key in keys if not table.has(*key)]
    if not missing:
        return
    with work(network, samples, device) as aimet:
        started = time.perf_counter()
        rounded, grids = aimet.adaround(iterations) if iterations else (aimet.network, None)
        seconds = time.perf_counter() - started
        for key in missing:
            found = network.held_out.measure_module(aimet.simulate(rounded, key[-2], key[-1], grids))
            gain = found.gain_over(network.held_out.float())
            table.add(*key, found.kl, found.top1, *gain, seconds)


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds calibration and dev")
    parser.add_argument("--checkpoint", type=Path, required=True, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 500], help="of each layer")
    parser.add_argument("--searched", action="store_true", help="the images that a search sees, alone")
    add_accelerator(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "aimet.csv")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    torch.manual_seed(0)
    device = device_of({"accelerator": arguments.accelerator})
    network = Network("mobilenet", arguments.checkpoint, arguments.data, device)
    samples = network.samples
    if arguments.searched:
        samples = samples.subset(split(len(samples), PTQSettings().parts, 0)[0])
    table = Table(arguments.out, COLUMNS, keys=5)
    for iterations in arguments.iterations:
        fill(table, network, iterations, samples, device)


if __name__ == "__main__":
    main()
