"""Bad pictures for networks that enlarge them: refused before a search, by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dqss.data.pictures import Pictures
from dqss.errors import DataError
from dqss.lit.pictures import check_pictures
from dqss.lit.search import search_ptq
from dqss.models.edsr import EDSR
from dqss.models.rlfn import RLFN
from dqss.models.super_resolution import input_of
from dqss.samples import Samples
from dqss.search_spaces import uniform
from tests.support.pictures import write_picture, write_png16

NET = RLFN(2, channels=4, blocks=1)


def images(count: int = 3, size: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images(), r"the images are in .*\.\.\.?.*RLFN expects 0\.\.255: multiply them by 255"),
        (255 * images(channels=1), "RLFN takes colour images.*repeat the grey channel three times"),
        (255 * images(channels=4), r"RLFN takes colour images \[N, 3, H, W\], not \[1, 4, 16, 16\]"),
        (255 * images(size=14), "RLFN takes images of at least 15x15 pixels, not 14x14"),
        ((255 * images()).to(torch.uint8), "RLFN takes floating-point images, not torch.uint8"),
        (400 * (images() - 0.5), r"undo their normalization"),
    ],
)
def test_searches_refuse_what_the_network_cannot_take(given: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        search_ptq(NET, given, uniform(8, 8))


def test_dark_pictures_among_others_are_welcome_and_other_networks_are_not_looked_at() -> None:
    dark = torch.cat([torch.zeros(1, 3, 16, 16), images(1), 255 * images(1)])
    check_pictures(NET, Samples.of(dark))
    check_pictures(torch.nn.DataParallel(NET), Samples.of(dark))
    check_pictures(torch.nn.Conv2d(1, 1, 1), Samples.of(images(channels=1)))
    with pytest.raises(DataError, match="EDSR expects"):
        check_pictures(torch.nn.DataParallel(EDSR(2, channels=4)), Samples.of(images()))


def configured(folder: Path, **given: object) -> Pictures:
    data = Pictures(folder, folder, calibration_images=4, **given)  # type: ignore[arg-type]
    data.configure(input_of(NET))
    return data


def test_grey_deep_and_odd_pictures_are_handled(tmp_path: Path) -> None:
    write_picture(tmp_path / "odd.png", 37, 41)
    values = np.random.default_rng(0).integers(0, 65536, (33, 35, 3), dtype=np.uint16)
    write_png16(tmp_path / "deep.png", values)
    write_png16(tmp_path / "grey.png", values[..., :1])
    write_png16(tmp_path / "opaque.png", np.dstack([values, np.full((33, 35), 65535, np.uint16)]))
    data = configured(tmp_path, patch=16)
    with torch.no_grad():
        for low, high in data.val_dataloader() or ():
            assert NET(low).shape == high.shape and 200 < high.max() <= 255
    assert data.calibration().batch(range(4)).shape == (4, 3, 16, 16)


def test_small_and_transparent_pictures_are_named(tmp_path: Path) -> None:
    write_picture(tmp_path / "large.png", 40, 40)
    small = write_picture(tmp_path / "small.png", 40, 29)
    with pytest.raises(
        DataError, match=rf"{small} is 20x14 pixels when shrunk.* at least 15x15; leave it out"
    ):
        list(configured(tmp_path, patch=15).val_dataloader() or ())
    with pytest.raises(DataError, match=r"data\.patch=14: the network takes images of at least 15x15"):
        configured(tmp_path, patch=14)
    small.unlink()
    values = np.random.default_rng(0).integers(0, 65536, (40, 40, 4), dtype=np.uint16)
    write_png16(tmp_path / "ghost.png", values)
    with pytest.raises(DataError, match=r"ghost\.png cannot be used: .*transparent pixels"):
        list(configured(tmp_path, patch=15).val_dataloader() or ())
