"""The whole network tuned at once, end to end, from where its units were left.

Units are tuned one after the other for outputs of their own, and none knows which of its errors matter in
the end. Here roundings, activation steps and biases of all layers learn together from the distance of the
network's output to that of the float network. From scratch that fits a few hundred inputs and nothing else
(arXiv 2102.05426, table 1); so it begins with tuned units, is short, and learns from inputs that
are transformed anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dqss.attach import INPUT_QUANTIZER, attach_weight, detach_weight
from dqss.calls import call_model
from dqss.errors import NonFiniteError
from dqss.losses import Distance
from dqss.measure import batches, to_device
from dqss.mixing import Codes
from dqss.randomness import generator_for
from dqss.repair.augment import Augmentation
from dqss.repair.blending import can_blend
from dqss.repair.dropping import DroppingQuantizer
from dqss.repair.found import Found, input_quantizers, put
from dqss.repair.keeping import KeptSteps
from dqss.repair.settings import RepairSettings
from dqss.repair.straight import StraightRounding
from dqss.samples import Samples

JUDGED_COPIES = 7
"""How often the inputs that judge are transformed like the others, besides themselves: they are few."""
KEEP_EVERY = 25
"""Iterations from one kept state to the next."""


@dataclass(frozen=True)
class NetworkErrors:
    """Mean distance of the network's output to the float network's.

    Attributes:
        held_out: before and after, on inputs that nothing learned from and on transformed ones of them (where
            nothing is held out, on those that were learned from).
        changed: share of the weights whose code is another than before.
        kept: whether the result is used.
    """

    held_out: tuple[float, float]
    changed: float
    kept: bool


class NetworkReconstruction:
    """Of all layers at once.

    Args:
        network: the quantized one: fixed, frozen, in ``eval()``; changed in place.
        exact: the float one.
        weights: float weight of each layer that is rounded, and its codes so far.
        samples: of one size; the last ones are held out.
        learned: how many are learned from.
        distance: of outputs.
        settings: how.
        seed: of batches and transformations.
        fixed: layers whose activations' steps do not learn, since others share them or since they are
            powers of two.
    """

    def __init__(
        self,
        network: nn.Module,
        exact: nn.Module,
        weights: Mapping[str, tuple[Tensor, Codes]],
        samples: Samples,
        learned: int,
        distance: Distance,
        settings: RepairSettings,
        seed: int,
        fixed: Collection[str] = (),
    ) -> None:
        self.network, self.exact, self.weights, self.fixed = network, exact, dict(weights), fixed
        self.samples, self.learned, self.distance = samples, learned, distance
        self.settings, self.seed = settings, seed
        usual = ("blend",) if can_blend(samples.batch(range(1))) else ()
        self.augment = Augmentation(settings.augment or usual)
        self.device = next(iter(self.weights.values()))[0].device

    def run(
        self, kept: KeptSteps, advance: Callable[[int], None] = lambda count: None
    ) -> tuple[Found, NetworkErrors]:
        """Learn, and keep that if it is better on what was held out.

        Raises:
            NonFiniteError: where the distance is NaN or infinite beforehand.
        """
        before = self.error()
        if not torch.isfinite(torch.tensor(before)):
            raise NonFiniteError(f"repair: the distance to the float network is {before} before it is tuned")
        found = self._learn(kept, advance)
        undo = self.put(found)
        after = self.error()
        better = after < before
        if not better:
            undo()
        errors = NetworkErrors((before, after), self._changed(found) if better else 0.0, better)
        return found if better else Found(), errors

    def put(self, found: Found) -> Callable[[], None]:
        """Put what was found into the network; gives back what undoes it."""
        return put(self.network, found, {name: codes.grid for name, (_, codes) in self.weights.items()})

    @torch.no_grad()
    def error(self) -> float:
        """Mean distance of the network as it stands, on inputs that judge it."""
        count = len(self.samples)
        judges = range(self.learned, count) if self.learned < count else range(count)
        rounds = 1 + (JUDGED_COPIES if self.augment.steps else 0)
        total = 0.0
        for turn in range(rounds):
            generator = generator_for(self.seed, "network judged", turn)
            order = torch.randperm(len(judges), generator=generator).tolist()
            for rows in batches([judges[k] for k in order], self.settings.batch_size):
                inputs = self.samples.batch(rows)
                inputs = self.augment(inputs, generator) if turn else inputs
                total += float(self._distance(to_device(inputs, self.device))) * len(rows)
        return total / (rounds * len(judges))

    def _distance(self, inputs: Any) -> Tensor:
        with torch.no_grad():
            wanted = self.distance.read(call_model(self.exact, _copy(inputs)))
        return self.distance(call_model(self.network, _copy(inputs)), wanted)

    def _learn(self, kept: KeptSteps, advance: Callable[[int], None]) -> Found:
        settings = self.settings
        with self._learning() as learning, torch.enable_grad():
            optimizer = torch.optim.Adam(learning.groups)
            rates = [group["lr"] for group in optimizer.param_groups]
            done = kept.get(optimizer)
            advance(done)
            for iteration in range(done, settings.network_iterations):
                share = (1 + cos(pi * iteration / settings.network_iterations)) / 2
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                loss = self._distance(self._inputs(iteration))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                for rounding in learning.roundings.values():
                    rounding.confine()
                advance(1)
                if (iteration + 1) % KEEP_EVERY == 0 or iteration + 1 == settings.network_iterations:
                    kept.put(optimizer, iteration + 1)
            return learning.found()

    def _inputs(self, iteration: int) -> Any:
        """Of one iteration: a function of its number, so that a resumed run goes on with the same."""
        size = min(self.settings.batch_size, self.learned)
        turn, position = divmod(iteration, self.learned // size)
        order = torch.randperm(self.learned, generator=generator_for(self.seed, "network", turn)).tolist()
        rows = order[position * size : (position + 1) * size]
        generator = generator_for(self.seed, "network blend", iteration)
        return to_device(self.augment(self.samples.batch(rows), generator), self.device)

    @contextmanager
    def _learning(self) -> Iterator[_Learning]:
        """What learns, in the place of what is there."""
        settings, found = self.settings, _Learning()
        sizes = self._output_sizes()
        with ExitStack() as stack:
            for name, quantizer in input_quantizers(self.network).items():
                if name in self.fixed:
                    continue
                layer = self.network.get_submodule(name)
                generator = torch.Generator()  # nothing is dropped
                step = DroppingQuantizer(quantizer, 0.0, True, generator).to(self.device)
                setattr(layer, INPUT_QUANTIZER, step)
                stack.callback(setattr, layer, INPUT_QUANTIZER, quantizer)
                found.steps[name] = step
                found.add(step.shift, settings.network_step_learning_rate)
            for name, (weight, codes) in self.weights.items():
                layer = self.network.get_submodule(name)
                rounding = StraightRounding(weight, codes).to(self.device)
                attach_weight(layer, rounding)
                stack.callback(detach_weight, layer)
                found.roundings[name] = rounding
                found.add(rounding.h, settings.network_learning_rate)
            for name, size in sizes.items():
                layer = self.network.get_submodule(name)
                before: Tensor = layer.bias  # type: ignore[assignment]
                layer.bias = nn.Parameter(before.detach().clone())
                stack.callback(setattr, layer, "bias", before)
                found.biases[name] = layer.bias
                found.add(layer.bias, settings.network_step_learning_rate * size)
            yield found

    @torch.no_grad()
    def _output_sizes(self) -> dict[str, float]:
        """Root mean square of what each rounded layer with a bias gives in the float network."""
        sums: dict[str, float] = {}
        with ExitStack() as stack:
            for name in self.weights:
                layer = self.exact.get_submodule(name)
                if getattr(layer, "bias", None) is None:
                    continue

                def note(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    sums[name] = float(output.double().square().mean().sqrt())

                stack.callback(layer.register_forward_hook(note).remove)
            rows = range(min(self.settings.batch_size, self.learned))
            call_model(self.exact, to_device(self.samples.batch(rows), self.device))
        return sums

    def _changed(self, found: Found) -> float:
        total = changed = 0
        for name, integers in found.codes.items():
            changed += int((self.weights[name][1].integers.cpu() != integers).sum())
            total += integers.numel()
        return changed / max(total, 1)


class _Learning:
    """The parts that learn, and how fast each does."""

    def __init__(self) -> None:
        self.roundings: dict[str, StraightRounding] = {}
        self.steps: dict[str, DroppingQuantizer] = {}
        self.biases: dict[str, nn.Parameter] = {}
        self.groups: list[dict[str, Any]] = []

    def add(self, parameter: nn.Parameter, rate: float) -> None:
        self.groups.append({"params": [parameter], "lr": rate})

    def found(self) -> Found:
        """As it stands, on the CPU."""
        return Found(
            codes={name: rounding.codes().integers.cpu() for name, rounding in self.roundings.items()},
            scales={name: step.scale().detach().cpu() for name, step in self.steps.items()},
            biases={
                name: bias.detach().to("cpu", torch.float32).clone() for name, bias in self.biases.items()
            },
        )


def _copy(inputs: Any) -> Any:
    """Networks may write to their inputs."""
    return tree_map_only(Tensor, torch.clone, inputs)
