"""Study: which ranges of inputs suit photographs that calibration did not see? See README.md here.

    python -m experiments.sr_rlfn.unseen --data FOLDER

Fitted weights with one algorithm for all inputs, nothing learned, at eight bits: PSNR that is lost to the
float network on the photographs of ``BSDS_train`` which no calibration patch of the seed is from (whole),
beside what Set5 and Set14 lose; and squared errors there, of all colours and of luma. Written to unseen.csv.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dqss.data.patches import Patches
from dqss.data.pictures import Pictures
from dqss.image_quality import psnr_y
from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.settings import PTQSettings
from dqss.losses import LumaSquaredError, MeanSquaredError
from dqss.progress import Reporter
from dqss.search_spaces import uniform
from dqss.uniform import uniform_assignments
from experiments.harness import CPU, Table, quiet, study_parser
from experiments.sr_rlfn.run import PATCHES, SCALE, SETS, Study

HERE = Path(__file__).parent
COLUMNS = ("seed", "patch", "weights", "inputs", "pictures", "unseen", "mse", "luma", "set5", "set14")
INPUTS = ["mse", "hessian", "minmax", {"name": "percentile", "p": 99.99}]


class Unseen:
    """Whole photographs that a seed's calibration has no patch of."""

    def __init__(self, study: Study, seed: int) -> None:
        data = Pictures(study.data / "BSDS_train", None, PATCHES, study.patch, seed)
        data.configure(study.input)
        patches = Patches(data.training, data.size, PATCHES, seed, augment=False)
        seen = {patches.picture(index) for index in range(PATCHES)}
        left = (data.training[k].whole() for k in range(len(data.training)) if k not in seen)
        pairs = [data.units(*pair) for pair in left]
        self.pictures = [(low.unsqueeze(0), high.unsqueeze(0)) for low, high in pairs]
        with torch.no_grad():
            self.exact = [study.model(low) for low, _ in self.pictures]
        self.before = self._psnr(self.exact)

    def _psnr(self, made: list[Tensor]) -> float:
        pairs = zip(made, self.pictures, strict=True)
        found = [psnr_y(image, high, peak=255.0, border=SCALE) for image, (_, high) in pairs]
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> tuple[float, float, float]:
        """PSNR that is lost in dB, squared error of all colours, and of luma."""
        made = [network(low) for low, _ in self.pictures]
        errors = (
            float(torch.stack([distance(*pair) for pair in zip(made, self.exact, strict=True)]).mean())
            for distance in (MeanSquaredError(), LumaSquaredError())
        )
        return self.before - self._psnr(made), *errors


def main() -> None:
    """Compute all rows."""
    parser = study_parser(__doc__, HERE / "unseen.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", type=int, default=64, help="pixels a side of a patch")
    parser.add_argument("--weights", default="adaround", help="their algorithm")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    settings = PTQSettings(batch_size=2, discrete_every=0, smooth=True)
    study = Study(arguments.data, settings, patch=arguments.patch)
    space = uniform(8, 8, [arguments.weights], INPUTS)
    patches = study.patches(arguments.seed)
    found = build(study.model, patches, space, settings, arguments.seed, None, device_of(CPU), Reporter())
    supernet, unseen = found[1].supernet, Unseen(study, arguments.seed)
    before = {name: study.psnr(study.model, name) for name in SETS}
    table = Table(arguments.out, COLUMNS, 4)
    for name, assignment in uniform_assignments(supernet).items():
        inputs = name.split(" / A ")[1].split("@")[0]
        key = (arguments.seed, arguments.patch, arguments.weights, inputs)
        with supernet.assign(assignment):
            lost = [before[each] - study.psnr(supernet, each) for each in SETS]
            table.add(*key, len(unseen.pictures), *unseen(supernet), *lost)


if __name__ == "__main__":
    main()
