"""Distances against scipy and torch, sample by sample."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.errors import DataError
from dqss.image_quality import psnr_y
from dqss.losses import (
    Distance,
    KLDivergence,
    LumaSquaredError,
    MeanAbsoluteError,
    MeanSquaredError,
    PictureLoss,
    TaskLoss,
    default_distance,
)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_kl_is_scipys_averaged_over_positions(shape: tuple[int, ...], spread: float) -> None:
    output, reference = spread * torch.randn(shape), spread * torch.randn(shape)
    found = KLDivergence().per_sample(output, reference)
    log_p, log_q = (scipy.special.log_softmax(t.double().numpy(), -1) for t in (reference, output))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    if spread == 1.0:
        np.testing.assert_allclose(kl, scipy.stats.entropy(np.exp(log_p), np.exp(log_q), axis=-1), rtol=1e-9)
    np.testing.assert_allclose(found, kl.reshape(shape[0], -1).mean(1), rtol=1e-4, atol=1e-5)
    assert (KLDivergence().per_sample(reference, reference) == 0).all()


def test_kl_has_the_gradient_of_kl_div() -> None:
    reference = torch.randn(4, 3, 6)
    ours, theirs = (torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours.requires_grad_()
    theirs.requires_grad_()
    KLDivergence()(ours, reference).backward()
    F.kl_div(theirs.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad / 12, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("distance", "torchs"), [(MeanSquaredError(), F.mse_loss), (MeanAbsoluteError(), F.l1_loss)]
)
def test_image_distances_are_torchs(distance: Distance, torchs: object) -> None:
    output, reference = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    found = distance.per_sample(output, reference)
    assert found.shape == (4,)
    for index in range(4):
        torch.testing.assert_close(found[index], torchs(output[index], reference[index]))  # type: ignore[operator]
    torch.testing.assert_close(distance(output, reference), torchs(output, reference))  # type: ignore[operator]


def test_luma_distance_is_what_psnr_on_luma_sees() -> None:
    """Of pictures of whole pixels, whose peak signal-to-noise ratio rounds nothing away."""
    output, reference = (torch.randint(0, 256, (2, 3, 5, 6)).float() for _ in range(2))
    ratio = psnr_y(output, reference, peak=255.0, border=0)
    found = LumaSquaredError().per_sample(output, reference)
    torch.testing.assert_close(found.double(), 255.0**2 / 10 ** (ratio / 10), rtol=1e-5, atol=0)


def test_luma_distance_is_for_colours() -> None:
    with pytest.raises(DataError, match=r"luma distance is for colour images \[N, 3, H, W\]"):
        LumaSquaredError()(torch.randn(2, 10), torch.randn(2, 10))
    # Clip ranges by curvature ask for this before any distance was measured.
    for shape in ((2, 10), (2, 1, 4, 4)):
        with pytest.raises(DataError, match=r"luma distance is for colour images \[N, 3, H, W\]"):
            LumaSquaredError().curvature_root(torch.randn(shape), torch.ones(shape))


def test_distance_reads_structured_and_half_precision_outputs() -> None:
    logits, reference = torch.randn(3, 5), torch.randn(3, 5)
    wanted = KLDivergence()(logits, reference)
    assert torch.equal(KLDivergence()(SimpleNamespace(logits=logits), reference), wanted)
    assert torch.equal(KLDivergence()({"aux": reference, "logits": logits}, reference), wanted)
    assert torch.equal(KLDivergence(read=lambda pair: pair[1])((reference, logits), reference), wanted)
    half = KLDivergence()(logits.bfloat16(), reference)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, KLDivergence()(logits.bfloat16().float(), reference))


def test_task_loss_is_cross_entropy_and_wants_labels() -> None:
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    assert torch.equal(TaskLoss()({"logits": logits}, logits, labels), F.cross_entropy(logits, labels))

    def margin(output: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(output, targets)

    assert torch.equal(TaskLoss(margin)(logits, logits, labels), F.multi_margin_loss(logits, labels))
    with pytest.raises(DataError, match="needs labels"):
        TaskLoss()(logits, logits, None)


def test_picture_loss_is_l1_to_the_pictures() -> None:
    output, reference, pictures = torch.randn(3, 2, 3, 4, 5)
    wanted = (output - pictures).abs().sum() / output.numel()
    torch.testing.assert_close(PictureLoss()((output,), reference, pictures), wanted)
    with pytest.raises(DataError, match=r"needs the pictures themselves.* use loss=mse"):
        PictureLoss()(output, reference, None)


@pytest.mark.parametrize(
    ("shape", "name"), [((2, 10), "kl"), ((2, 5, 10), "kl"), ((2, 3, 8, 8), "mse"), ((2, 3, 2, 8, 8), "mse")]
)
def test_default_is_kl_for_logits_and_mse_for_images(shape: tuple[int, ...], name: str) -> None:
    assert default_distance(torch.zeros(shape)).name == name
