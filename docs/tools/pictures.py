"""The pictures of ``docs/how-it-works.md``, from a finished run of the embedded network.

make search ARGS='run_dir=RUN_DIR'
python -m docs.tools.pictures RUN_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from dqss.quantizers import StaticQuantizer
from dqss.report.record import RunRecord
from dqss.report.run import Run
from dqss.spec import Candidate, QuantSpec

FOLDER = Path(__file__).resolve().parent.parent / "pictures"
BLUE, ORANGE, GREY = "#08468b", "#b45f06", "#8a94a6"
DASHES = ["-", "--", ":", "-."]


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="folder of a finished search")
    run = Run.read(parser.parse_args().run)
    # The same file for the same run, to the byte.
    matplotlib.rcParams.update({"svg.hashsalt": "dqss", "font.size": 9, "axes.spines.top": False})
    mixture()
    losses(run)
    course(run)
    assert run.record is not None
    clips(run.record)


def mixture() -> None:
    """Two grids of two bits, and their mean: the staircase of a mixture has more steps than either."""
    x = torch.linspace(-1.5, 1.5, 1201)
    spec = QuantSpec(2, symmetric=False)
    outputs = []
    for low, high in ((-1.0, 1.0), (-0.55, 0.75)):
        quantizer = StaticQuantizer(Candidate.of("minmax", spec), 1)
        scale = (high - low) / 3
        quantizer.scale.fill_(scale)
        quantizer.zero_point.fill_(round(-low / scale))
        outputs.append(quantizer(x).detach())
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(x, outputs[0], color=GREY, ls="--", label="one candidate")
    axes.plot(x, outputs[1], color=GREY, ls=":", label="another")
    axes.plot(x, (outputs[0] + outputs[1]) / 2, color=BLUE, label="their mixture, half and half")
    axes.set(xlabel="value", ylabel="as the layer sees it")
    _save(figure, axes, "mixture")


def losses(run: Run) -> None:
    """Loss of the relaxed network beside the distance of the discrete one."""
    steps, soft = np.array(run.history["step"]), np.array(run.history["soft_loss"], dtype=float)
    window = 30
    mean = np.convolve(soft, np.ones(window) / window, "valid")
    found = [(s, d) for s, d in zip(steps, run.history["discrete_distance"], strict=True) if d is not None]
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.semilogy(steps[window - 1 :], mean, color=BLUE, label=f"relaxed network (mean of {window} steps)")
    axes.semilogy(*zip(*found, strict=True), "D:", color=ORANGE, ms=4, label="discrete network")
    axes.set(xlabel="step", ylabel=f"{run.metrics['distance']} to the float network")
    _save(figure, axes, "losses")


def course(run: Run, name: str = "layer2.2.conv2.activation") -> None:
    """How the probabilities of one decision's options moved."""
    assert run.trajectory is not None and run.record is not None
    labels, rows = run.record.decisions[name].labels, run.trajectory.probabilities[name]
    chosen = run.record.decisions[name].chosen
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for k, label in enumerate(labels):
        style = {"color": ORANGE, "lw": 2.4} if k == chosen else {"color": BLUE, "lw": 1, "ls": DASHES[k % 4]}
        axes.plot(run.trajectory.steps, rows[:, k], label=label, **style)
    axes.set(xlabel="step", ylabel="probability", title=name)
    _save(figure, axes, "course")


def clips(record: RunRecord, layer: str = "layer2.1.conv2") -> None:
    """A tensor's values, and what each candidate can represent of them."""
    tensor = next(one for one in record.tensors if (one.layer, one.role) == (layer, "activation"))
    decision, seen = record.decisions[tensor.decision], tensor.histogram
    assert seen is not None
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 3.8), sharex=True, height_ratios=[3, 2])
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    top.stairs(seen.counts, edges, fill=True, color=GREY)
    top.set(yscale="log", ylabel="count", title=f"input of {layer}")
    for k, clip in enumerate(tensor.ranges):
        ink = ORANGE if k == decision.chosen else BLUE
        bottom.plot([clip.low, clip.high], [k, k], "|-", color=ink, lw=3 if k == decision.chosen else 1.2)
    bottom.set(yticks=range(len(decision.labels)), xlabel="value")
    bottom.set_yticklabels(decision.labels, fontsize=7)
    bottom.invert_yaxis()
    _save(figure, None, "clips")


def _save(figure: plt.Figure, axes: plt.Axes | None, name: str) -> None:
    if axes is not None:
        axes.legend(fontsize=7, frameon=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
