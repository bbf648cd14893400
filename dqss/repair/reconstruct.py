"""One unit, tuned until its output is that of the float network as nearly as rounding allows.

Rounding is soft while it is learned, and pulled to up or down in the end (AdaRound, arXiv 2004.10568);
all layers of a block learn together against the block's output (BRECQ, arXiv 2102.05426), while
activations are quantized at random (QDrop, arXiv 2203.05740).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from dqss.attach import INPUT_QUANTIZER, attach_weight, detach_weight
from dqss.errors import NonFiniteError
from dqss.mixing import Codes
from dqss.randomness import generator_for
from dqss.repair.chance import chances
from dqss.repair.dropping import DroppingQuantizer
from dqss.repair.found import Found, input_quantizers, put
from dqss.repair.rounding import SoftRounding, regularizer
from dqss.repair.settings import RepairSettings
from dqss.repair.units import Unit

BETA = (20.0, 2.0)
"""Of the regularizer, from the end of the warm-up to the last iteration (AdaRound, section 4)."""


@dataclass(frozen=True)
class Data:
    """What a unit is given and should give, a row each.

    Attributes:
        quantized: its input in the quantized network, ``[R, ...]``.
        exact: its input in the float network; None where none of it is used.
        wanted: its output in the float network.
        learned: rows ``[:learned]`` are for learning, the others are held out.
    """

    quantized: Tensor
    exact: Tensor | None
    wanted: Tensor
    learned: int


@dataclass(frozen=True)
class UnitErrors:
    """Mean squared error of a unit's output over the mean square of what it should be.

    Attributes:
        learned, held_out: before and after, on the rows that were learned from and on the others
            (zeros where there are none).
        changed: share of the weights that are not rounded to the nearest code of the grid that they began on.
        kept: whether the result is used; otherwise the unit is left as it was.
    """

    learned: tuple[float, float]
    held_out: tuple[float, float]
    changed: float
    kept: bool


class Reconstruction:
    """Of one unit.

    Args:
        network: the quantized one: fixed, frozen, in ``eval()``; the unit in it is changed in place.
        unit: which.
        weights: float weight and codes of each of its layers.
        settings: how.
        seed: of batches and chances, with the unit's name.
        fixed: layers whose activations' steps do not learn, since others share them or since they are
            powers of two.
        fixed_weights: layers whose weights' steps do not.
    """

    def __init__(
        self,
        network: nn.Module,
        unit: Unit,
        weights: Mapping[str, tuple[Tensor, Codes]],
        settings: RepairSettings,
        seed: int,
        fixed: Collection[str] = (),
        fixed_weights: Collection[str] = (),
    ) -> None:
        self.fixed, self.fixed_weights = fixed, fixed_weights
        self.network, self.unit, self.weights, self.settings = network, unit, dict(weights), settings
        self.device = next(iter(self.weights.values()))[0].device
        self.generator = generator_for(seed, unit.name)
        on_cpu = self.device.type == "cpu"
        self.chance = self.generator if on_cpu else generator_for(seed, unit.name, device=self.device)

    def run(self, data: Data, advance: Callable[[], None] = lambda: None) -> tuple[Found, UnitErrors]:
        """Learn, round for good, and keep that if it is better on what was held out.

        Raises:
            NonFiniteError: where the unit's error is NaN or infinite.
        """
        before = self.errors(data)
        if not all(torch.isfinite(torch.tensor(before))):
            raise NonFiniteError(f"repair: the error of {self.unit.name!r} is {before[0]} before it is tuned")
        found = self._learn(data, before[0], advance)
        undo = self.put(found)
        after = self.errors(data)
        judge = 1 if data.learned < len(data.wanted) else 0
        kept = after[judge] < before[judge]
        changed = self._changed(found)
        if not kept:
            undo()
        errors = UnitErrors((before[0], after[0]), (before[1], after[1]), changed if kept else 0.0, kept)
        return found if kept else Found(), errors

    def put(self, found: Found) -> Callable[[], None]:
        """Put what was found into the network; gives back what undoes it."""
        return put(self.network, found, {name: codes.grid for name, (_, codes) in self.weights.items()})

    @torch.no_grad()
    def errors(self, data: Data) -> tuple[float, float]:
        """Of the unit as it stands: relative squared error on learned and on held-out rows."""
        sums = [[0.0, 0.0], [0.0, 0.0]]
        for held, rows in enumerate((range(data.learned), range(data.learned, len(data.wanted)))):
            for start in range(rows.start, rows.stop, 4 * self.settings.batch_size):
                run = slice(start, min(start + 4 * self.settings.batch_size, rows.stop))
                wanted = data.wanted[run].to(self.device)
                # A copy: a unit may begin with a ReLU in place.
                output = self.unit.run(self.network, data.quantized[run].to(self.device, copy=True))
                sums[held][0] += float((output.float() - wanted).double().square().sum())
                sums[held][1] += float(wanted.double().square().sum())
        learned, held_out = (error / size if size > 0 else error for error, size in sums)
        return learned, held_out

    def _learn(self, data: Data, scale: float, advance: Callable[[], None]) -> Found:
        settings = self.settings
        # Errors count in units of what they are with plain rounding, whatever the unit is made of.
        unit_size = scale * self._mean_square(data.wanted[: data.learned]) or 1.0
        with self._learning(data) as learning, torch.enable_grad():
            optimizer = torch.optim.Adam(learning.groups)
            rates = [group["lr"] for group in optimizer.param_groups]
            for iteration, rows in enumerate(self._batches(data.learned)):
                progress = iteration / max(settings.iterations, 1)
                # But for the roundings, which are to be decided in the end.
                for group, rate in zip(optimizer.param_groups[1:], rates[1:], strict=True):
                    group["lr"] = rate * (1 + cos(pi * progress)) / 2
                output = self.unit.run(self.network, self._inputs(data, rows))
                wanted = self._rows(data.wanted, rows)
                loss = (output.float() - wanted).square().mean() / unit_size
                if progress >= settings.warmup:
                    beta = _beta((progress - settings.warmup) / max(1 - settings.warmup, 1e-9))
                    loss = loss + settings.regularization * learning.undecided(beta)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance()
            return learning.found()

    def _mean_square(self, rows: Tensor) -> float:
        """In runs: the rows may be on disk."""
        runs = torch.split(rows, 4 * self.settings.batch_size)
        return sum(float(run.double().square().sum()) for run in runs) / rows.numel()

    def _inputs(self, data: Data, rows: Tensor) -> Tensor:
        """Quantized and float inputs, mixed value by value."""
        x = self._rows(data.quantized, rows)
        if data.exact is not None and self.settings.float_inputs > 0:
            chosen = chances(x.shape, self.settings.float_inputs, self.chance)
            x = torch.where(chosen, self._rows(data.exact, rows), x)
        return x

    def _rows(self, kept: Tensor, rows: Tensor) -> Tensor:
        """Some rows of what is kept, wherever that is, in a place of their own."""
        return kept[rows.to(kept.device)].to(self.device)

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Rows of each iteration: a permutation after the other."""
        size = min(self.settings.batch_size, count)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(self.settings.iterations):
            if len(left) < size:
                left = torch.cat([left, torch.randperm(count, generator=self.generator)])
            yield left[:size]
            left = left[size:]

    @contextmanager
    def _learning(self, data: Data) -> Iterator[_Learning]:
        """What learns, in the place of what is there."""
        settings = self.settings
        sizes = self._output_sizes(data) if settings.learn_biases else {}
        roundings, steps, biases = {}, {}, {}
        with ExitStack() as stack:
            for name, quantizer in input_quantizers(self.network, self.unit.modules).items():
                layer = self.network.get_submodule(name)
                learn = settings.learn_steps and settings.drop < 1 and name not in self.fixed
                step = DroppingQuantizer(quantizer, settings.drop, learn, self.chance)
                setattr(layer, INPUT_QUANTIZER, step.to(self.device))
                stack.callback(setattr, layer, INPUT_QUANTIZER, quantizer)
                steps[name] = step
            for name, (weight, codes) in self.weights.items():
                layer = self.network.get_submodule(name)
                learn = settings.learn_weight_steps and name not in self.fixed_weights
                roundings[name] = SoftRounding(weight, codes.grid, learn, _fitted(weight, codes)).to(
                    self.device
                )
                attach_weight(layer, roundings[name])
                stack.callback(detach_weight, layer)
            for name in sizes:
                layer = self.network.get_submodule(name)
                before: Tensor = layer.bias  # type: ignore[assignment]
                layer.bias = biases[name] = nn.Parameter(before.detach().clone())
                stack.callback(setattr, layer, "bias", before)
            yield _Learning(roundings, steps, biases, sizes, settings)

    @torch.no_grad()
    def _output_sizes(self, data: Data) -> dict[str, float]:
        """Root mean square of what each layer with a bias gives."""
        sizes: dict[str, float] = {}
        with ExitStack() as stack:
            for name in self.weights:
                layer = self.network.get_submodule(name)
                if layer.bias is not None:
                    stack.callback(layer.register_forward_hook(partial(_note_size, sizes, name)).remove)
            rows = torch.arange(min(self.settings.batch_size, data.learned))
            self.unit.run(self.network, self._rows(data.quantized, rows))
        return sizes

    def _changed(self, found: Found) -> float:
        total = changed = 0
        for name, integers in found.codes.items():
            weight, codes = self.weights[name]
            nearest = Codes.of(weight, codes.grid).integers.cpu()
            changed += int((nearest != integers).sum())
            total += integers.numel()
        return changed / max(total, 1)


class _Learning:
    """The parts of one unit that learn, and how fast each does."""

    def __init__(
        self,
        roundings: Mapping[str, SoftRounding],
        steps: Mapping[str, DroppingQuantizer],
        biases: Mapping[str, nn.Parameter],
        sizes: Mapping[str, float],
        settings: RepairSettings,
    ) -> None:
        self.roundings, self.steps, self.biases = roundings, steps, biases
        self.count = sum(soft.v.numel() for soft in roundings.values())
        shifts = [part.shift for part in (*steps.values(), *roundings.values())]
        rate = settings.step_learning_rate
        self.groups = [
            {"params": [soft.v for soft in roundings.values()], "lr": settings.learning_rate},
            {"params": [shift for shift in shifts if shift.requires_grad], "lr": rate},
            *({"params": [bias], "lr": rate * sizes[name]} for name, bias in biases.items()),
        ]

    def undecided(self, beta: float) -> Tensor:
        """Mean of the regularizer over all weights."""
        parts = [regularizer(soft.h(), beta) * soft.v.numel() for soft in self.roundings.values()]
        return torch.stack(parts).sum() / self.count

    def found(self) -> Found:
        """As it stands, on the CPU."""
        return Found(
            codes={name: soft.codes().integers.cpu() for name, soft in self.roundings.items()},
            scales={name: step.scale().detach().cpu() for name, step in self.steps.items() if step.learn},
            weight_scales={
                name: soft.scale().detach().cpu()
                for name, soft in self.roundings.items()
                if soft.shift.requires_grad
            },
            biases={name: bias.detach().to("cpu", torch.float32) for name, bias in self.biases.items()},
        )


def _fitted(weight: Tensor, codes: Codes) -> Tensor | None:
    """Codes that are not simply the nearest ones."""
    nearest = Codes.of(weight, codes.grid).integers
    return None if torch.equal(nearest, codes.integers) else codes.integers


def _note_size(sizes: dict[str, float], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    sizes[name] = float(output.double().square().mean().sqrt())


def _beta(progress: float) -> float:
    """Falls by a cosine, as the authors' own code has it: long high, long low."""
    high, low = BETA
    return low + (high - low) * (1 + cos(pi * progress)) / 2
