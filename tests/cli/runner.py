"""Runs the entry points as a shell would: in this process for speed, or in one of their own."""

import contextlib
import csv
import io
import json
import logging
import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from dqss.fused import fused

TINY = (
    "+experiment=resnet_ptq",
    "threads=1",
    "data.calibration_images=24",
    "method.steps=3",
    "method.refine.passes=1",
    "search_space.weight_algorithms=[minmax,mse]",
    "search_space.activation_algorithms=[minmax,mse]",
)
"""A whole search in about a second."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal; fails unless that is how the command ended."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        assert "Error executing job" not in self.err
        faults = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(faults) == 1 and self.err.rstrip().endswith(faults[0]), self.err
        return faults[0]


def call(command: str, *words: object, cwd: Path) -> Outcome:
    """``python -m dqss.COMMAND words...`` in this process, in the folder ``cwd``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.argv, os.getcwd(), torch.get_num_threads()
    environment = dict(os.environ)
    GlobalHydra.instance().clear()
    try:
        sys.argv = ["dqss", *map(str, words)]
        os.chdir(cwd)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            fused(False),
        ):
            warnings.filterwarnings("ignore", message=".*found in sys.modules")
            runpy.run_module(f"dqss.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        for handler in root.handlers:
            if handler not in before[0]:
                handler.close()
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        sys.argv = before[2]
        os.chdir(before[3])
        torch.set_num_threads(before[4])
        os.environ.clear()
        os.environ.update(environment)
        GlobalHydra.instance().clear()
    return Outcome(code, out.getvalue(), err.getvalue())


def spawn(command: str, *words: object, cwd: Path, prelude: str = "", fuse: bool = False) -> subprocess.Popen:
    """The same in a process of its own; ``prelude`` is Python that runs there first."""
    repository = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DQSS_FUSED": str(int(fuse))}
    start = [sys.executable, "-m", f"dqss.{command}"]
    if prelude:
        code = f"import runpy, sys\n{prelude}\nrunpy.run_module('dqss.{command}', run_name='__main__')"
        start = [sys.executable, "-c", code]
    return subprocess.Popen(
        [*start, *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> Outcome:
    out, err = process.communicate(timeout=timeout)
    return Outcome(process.returncode, out, err)


def results(folder: Path) -> dict[str, object]:
    """What a search decided and measured, without what clocks say."""
    strategy = json.loads((folder / "strategy.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert strategy.pop("created") and metrics.pop("seconds")
    with open(folder / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    for row in history:
        assert float(row.pop("seconds")) > 0
    tensors = {key: value.tolist() for key, value in load_file(folder / "tensors.safetensors").items()}
    record = json.loads((folder / "report.json").read_text())
    course = {key: value.tolist() for key, value in load_file(folder / "trajectory.safetensors").items()}
    decided = {"strategy": strategy, "metrics": metrics, "history": history, "tensors": tensors}
    return {**decided, "record": record, "course": course}
