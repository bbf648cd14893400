"""The canonical float network: one idea a file; :func:`prepare` does them in order."""

from dqss.prepare.hashing import check_finite, fingerprint, weights_sha256
from dqss.prepare.recipe import STEPS, Prepared, prepare
from dqss.prepare.standardize import PaddedConv2d
from dqss.prepare.unpack_attention import UnpackedAttention

__all__ = [
    "STEPS",
    "PaddedConv2d",
    "Prepared",
    "UnpackedAttention",
    "check_finite",
    "fingerprint",
    "prepare",
    "weights_sha256",
]
