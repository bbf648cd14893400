"""Products in full precision, whatever is set for the rest of the program."""

import pytest
import torch

from dqss.precision import full_precision


@pytest.mark.parametrize("allowed", [True, False])
def test_full_precision_is_over_with_its_block(allowed: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = allowed
        with pytest.raises(KeyError), full_precision():
            assert not cudnn.allow_tf32 and not matmul.allow_tf32
            raise KeyError
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (allowed, allowed)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = kept
