"""Products in full precision, whatever is set for the rest of the program, and in which way."""

import subprocess
import sys

import pytest

SETTINGS = {
    "nothing": "",
    "older": "matmul.allow_tf32 = cudnn.allow_tf32 = True",
    "older, off": "matmul.allow_tf32 = cudnn.allow_tf32 = False",
    "newer": "matmul.fp32_precision = 'tf32'",
    "newer, convolutions": "cudnn.conv.fp32_precision = 'tf32'; cudnn.rnn.fp32_precision = 'ieee'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "high": "torch.set_float32_matmul_precision('high')",
}
PROGRAM = """
import torch
from dqss.precision import full_precision

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

def state():
    found = {}
    for name, look in {
        "matmul": lambda: matmul.fp32_precision, "conv": lambda: cudnn.conv.fp32_precision,
        "rnn": lambda: cudnn.rnn.fp32_precision, "matmul, older": lambda: matmul.allow_tf32,
        "cudnn, older": lambda: cudnn.allow_tf32, "precision": torch.get_float32_matmul_precision,
    }.items():
        try:
            found[name] = look()
        except RuntimeError:
            found[name] = "refused"
    return {**found, "matmul": found["matmul"].replace("none", "ieee")}

%s
before = state()
try:
    with full_precision():
        inside = state()
        raise KeyError
except KeyError:
    pass
assert "tf32" not in (inside["matmul"], inside["conv"], inside["rnn"]), inside
refused = {name for name, value in inside.items() if value == "refused"}
assert refused <= {name for name, value in before.items() if value == "refused"} | %s, (before, inside)
assert state() == before, (before, state())
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_full_precision_is_over_with_its_block(setting: str) -> None:
    """In a process of its own: what was set in the newer way cannot be unset."""
    all_of_them = {"cudnn, older"} if setting.startswith("newer") else set()
    program = PROGRAM % (SETTINGS[setting], all_of_them or "set()")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
