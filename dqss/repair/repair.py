"""From a strategy to the same strategy with its roundings, steps and biases tuned."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqss.apply import apply_strategy, prepared_network, weight_codes
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.choice import TensorChoice
from dqss.errors import DataError
from dqss.losses import Distance, default_distance
from dqss.measure import batches, home, to_device
from dqss.mixing import Codes, Grid
from dqss.precision import full_precision
from dqss.progress import Reporter
from dqss.quantizers import shifts
from dqss.repair.augment import Augmentation, name_of
from dqss.repair.bias import correct_biases
from dqss.repair.cache import Store
from dqss.repair.clipping import clipping
from dqss.repair.feed import BATCH, Fed, Feed
from dqss.repair.found import Found, input_quantizers
from dqss.repair.keeping import Kept, KeptSteps
from dqss.repair.network import NetworkErrors, NetworkReconstruction
from dqss.repair.reconstruct import Reconstruction, UnitErrors
from dqss.repair.settings import RepairSettings
from dqss.repair.units import Unit, find_units
from dqss.samples import Samples, inputs_sha256
from dqss.spec import Role


@dataclass(frozen=True)
class Repaired:
    """What :func:`repair_strategy` made.

    Attributes:
        bundle: the strategy with its tuned tensors.
        errors: of each block or layer that was reconstructed, by its name, in the order of the network.
        left: names of the layers whose rounding stayed as it was: with a weight that others share, or
            not called once with one tensor.
        network: of all layers at once, where they were tuned so.
    """

    bundle: Bundle
    errors: dict[str, UnitErrors]
    left: list[str]
    network: NetworkErrors | None = None


@full_precision()
def repair_strategy(
    model: nn.Module,
    bundle: Bundle,
    inputs: Samples | Tensor | Iterable[Any],
    settings: RepairSettings | None = None,
    *,
    folder: Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    device: torch.device | None = None,
    force: bool = False,
    distance: Distance | None = None,
) -> Repaired:
    """Tune a strategy on unlabelled inputs: rounding, steps, biases.

    The choices stay: algorithms, bits and zero points, and steps where they are not to learn. Blocks are
    reconstructed one after the other in the order in which they run (arXiv 2004.10568, 2102.05426,
    2203.05740), each fed by the network as tuned so far; then all of it learns at once, end to end; then
    biases are corrected (arXiv 1906.04721), as ``settings`` say.

    Args:
        model: the trained float network, as it was given to the search; it is not changed.
        bundle: from :func:`dqss.load` or a search.
        inputs: as the search takes them, all of one size.
        settings: see :class:`RepairSettings`.
        folder: the run folder; finished blocks are kept below it and not repeated after an interruption.
        seed: of batches and chances.
        reporter: progress; silent by default.
        device: where to work; None: where the model is.
        force: also for other weights than were searched.
        distance: of outputs, for ``network_iterations``; None: the one that suits the network's output.

    Returns:
        The new strategy, and the error of every block before and after.

    Raises:
        UserError: for blocks that are not there, another model, inputs of several sizes, or a transformation
            that does not suit them.
    """
    settings, reporter = settings or RepairSettings(), reporter or Reporter()
    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    check_samples(samples, settings)
    work = _Work(model, bundle, samples, settings, folder, seed, reporter, device, force)
    if settings.iterations > 0:
        work.reconstruct()
    if settings.network_iterations > 0:
        work.learn_together(distance)
    if settings.bias_correction:
        work.correct()
    return Repaired(work.result(), work.errors, work.left, work.network)


def check_samples(samples: Samples, settings: RepairSettings) -> None:
    """Refuse inputs that repair cannot learn from; a search asks before it begins.

    Raises:
        DataError: for inputs of several sizes.
        UserError: for a transformation that does not suit them.
    """
    if not samples.uniform:
        raise DataError("repair: the inputs differ in shape: give inputs of one size")
    Augmentation(settings.augment).check(samples.batch(range(min(2, len(samples)))))


class _Work:
    """The two networks side by side, and what was found so far."""

    def __init__(
        self,
        model: nn.Module,
        bundle: Bundle,
        samples: Samples,
        settings: RepairSettings,
        folder: Path | None,
        seed: int,
        reporter: Reporter,
        device: torch.device | None,
        force: bool,
    ) -> None:
        self.bundle, self.samples, self.settings = bundle, samples, settings
        self.folder, self.seed, self.reporter = folder, seed, reporter
        self.device = device or home(model)
        self.augment = Augmentation(settings.augment)
        self.quantized = apply_strategy(model, bundle, force=force).to(self.device)
        self.exact = prepared_network(model, bundle).eval().requires_grad_(False).to(self.device)
        self.found: dict[str, Found] = {}
        self.errors: dict[str, UnitErrors] = {}
        self.together = Found()
        self.network: NetworkErrors | None = None
        self.biases: dict[str, Tensor] = {}
        self.left: list[str] = []

    def batches(self) -> Iterator[Any]:
        """All inputs, from the first one on."""
        for run in batches(range(len(self.samples)), BATCH):
            yield to_device(self.samples.batch(run), self.device)

    # -- reconstruction -----------------------------------------------------------------------

    def feed(self, store: Store) -> Feed:
        """What units learn from."""
        copies = self.settings.augment_copies if self.settings.augment else 0
        fed = Fed(self.samples, self.learned(), copies, self.augment, self.seed, self.device)
        return Feed(self.quantized, self.exact, fed, self.settings.float_inputs > 0, store)

    def reconstruct(self) -> None:
        """Unit by unit; those that were finished in an earlier run are taken from there."""
        weights = self._weights()
        example = to_device(self.samples.batch(range(min(2, len(self.samples)))), self.device)
        units, left = find_units(self.exact, list(weights), self.settings.blocks, example)
        chosen = [name for name, layer in self.bundle.strategy.layers.items() if layer.weight is not None]
        self.left = [name for name in chosen if name not in weights or name in left]
        kept = Kept(self.folder, self._identity())
        with (
            closing(Store(self.settings.cache_mb * 2**20, self.folder, self.device)) as store,
            self.reporter.stage("repair", len(units) * self.settings.iterations) as stage,
            clipping(self.exact, self._clipped()),
        ):
            feed = self.feed(store)
            for position, unit in enumerate(units):
                own = {name: weights[name] for name in unit.layers}
                task = Reconstruction(
                    self.quantized,
                    unit,
                    own,
                    self.settings,
                    self.seed,
                    self._fixed(Role.ACTIVATION),
                    self._fixed(Role.WEIGHT),
                )
                known = kept.get(position, unit)
                if known is None:
                    found, errors = task.run(feed.data(unit), stage.advance)
                    kept.put(position, unit, found, errors)
                else:
                    found, errors = known
                    task.put(found)
                    stage.advance(self.settings.iterations)
                self.found[unit.name], self.errors[unit.name] = found, errors
                self.reporter.say(_told(unit, errors, position, len(units)))

    def _clipped(self) -> dict[str, Grid]:
        """Grids of the inputs that are to be cut off for what units should give, too."""
        if not self.settings.clipped_targets:
            return {}
        return {name: quantizer.grid() for name, quantizer in input_quantizers(self.quantized).items()}

    def _weights(self) -> dict[str, tuple[Tensor, Codes]]:
        """Float weight and codes of every layer that can be rounded by itself."""
        modules = dict(self.exact.named_modules())
        count = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
        found = {}
        for name, layer in self.bundle.strategy.layers.items():
            if layer.weight is None:
                continue
            weight: Tensor = modules[name].weight
            if count[id(weight)] == 1:
                found[name] = (weight, weight_codes(self.bundle, name, weight))
        return found

    def _shared(self) -> set[str]:
        """Layers that read a tensor which somebody else quantizes as well: one tensor, one step.

        Only where there are points: without them each reader has a grid of its own, tied or not.
        """
        strategy = self.bundle.strategy
        if not strategy.points:
            return set()
        readers = {
            name: layer.activation.decision for name, layer in strategy.layers.items() if layer.activation
        }
        points = (c.decision for point in strategy.points.values() for c in point.operands.values())
        count = Counter([*readers.values(), *points])
        return {name for name, decision in readers.items() if count[decision] > 1}

    def _fixed(self, role: Role) -> set[str]:
        """Layers whose steps of that role do not learn: what others share, and powers of two, which shift."""
        choices = [(name, one) for name, each, one in self.bundle.strategy.choices() if each == role.value]
        shared = self._shared() if role is Role.ACTIVATION else set()
        return shared | {name for name, choice in choices if shifts(choice.algorithm)}

    def _identity(self) -> str:
        """Of everything that the reconstruction depends on."""
        usual = RepairSettings()
        settings = replace(
            self.settings,
            augment=(),
            augment_copies=usual.augment_copies,
            bias_correction=False,
            cache_mb=0,
            network_iterations=0,
            network_learning_rate=usual.network_learning_rate,
            network_step_learning_rate=usual.network_step_learning_rate,
        )
        digest = hashlib.sha256(f"{self.seed} {settings!r} {inputs_sha256(self.samples)}".encode())
        if self.settings.augment:
            names, copies = [name_of(step) for step in self.settings.augment], self.settings.augment_copies
            digest.update(f"{names} {copies}".encode())
        digest.update(f"{sorted(self._fixed(Role.ACTIVATION))} {sorted(self._fixed(Role.WEIGHT))}".encode())
        strategy = self.bundle.strategy
        digest.update(strategy.model.weights_sha256.encode())
        digest.update(repr([(n, r, c.candidate()) for n, r, c in strategy.choices()]).encode())
        for key in sorted(self.bundle.tensors):
            digest.update(key.encode())
            digest.update(self.bundle.tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # -- all at once --------------------------------------------------------------------------

    def learn_together(self, distance: Distance | None) -> None:
        """Roundings, steps and biases of all layers; goes on from where an earlier run was interrupted."""
        weights = {
            name: (weight, self.codes_of(name, codes)) for name, (weight, codes) in self._weights().items()
        }
        if not weights:
            return
        if distance is None:
            with torch.no_grad():
                example = to_device(self.samples.batch(range(1)), self.device)
                distance = default_distance(first_tensor(call_model(self.exact, example)))
        task = NetworkReconstruction(
            self.quantized,
            self.exact,
            weights,
            self.samples,
            self.learned(),
            distance,
            self.settings,
            self.seed,
            self._fixed(Role.ACTIVATION),
        )
        digest = hashlib.sha256(f"{self._identity()} {self._together()} {distance.name}".encode())
        with self.reporter.stage("repair: network", self.settings.network_iterations) as stage:
            self.together, errors = task.run(KeptSteps(self.folder, digest.hexdigest()), stage.advance)
        self.network, (before, after) = errors, errors.held_out
        word = "" if errors.kept else ", not better and left as it was"
        self.reporter.say(
            f"repaired the network: distance on held-out inputs {before:.4g} -> {after:.4g}{word}"
        )

    def codes_of(self, name: str, codes: Codes) -> Codes:
        """The codes of a layer's weight so far, where those of the strategy are ``codes``."""
        found = next((found for found in self.found.values() if name in found.codes), None)
        if found is None:
            return codes
        return Codes(found.codes[name].to(self.device), found.regrid(name, codes.grid))

    def learned(self) -> int:
        """How many of the inputs are learned from; the others are held out."""
        count, share = len(self.samples), self.settings.held_out
        held = max(1, round(share * count)) if share > 0 else 0
        return count - min(held, count - 1)

    def _together(self) -> tuple[float, ...]:
        """The settings that only this part depends on."""
        settings = self.settings
        return (
            settings.network_iterations,
            settings.network_learning_rate,
            settings.network_step_learning_rate,
        )

    # -- bias correction ----------------------------------------------------------------------

    def correct(self) -> None:
        """The biases of all layers whose weight or input is quantized."""
        layers = [
            name for name, layer in self.bundle.strategy.layers.items() if layer.weight or layer.activation
        ]
        with self.reporter.stage("biases", len(layers)) as stage:
            self.biases, left = correct_biases(
                self.exact, self.quantized, layers, self.batches, stage.advance
            )
        if left:
            self.reporter.say(f"biases left alone, of layers that are not called once: {', '.join(left)}")

    # -- result -------------------------------------------------------------------------------

    def result(self) -> Bundle:
        """The strategy with what was found in its tensors."""
        tensors = dict(self.bundle.tensors)
        several = [*self.found.values(), self.together, Found(biases=self.biases)]
        codes = {name: each for found in several for name, each in found.codes.items()}
        scales = {name: each for found in several for name, each in found.scales.items()}
        weight_scales = {name: each for found in several for name, each in found.weight_scales.items()}
        biases = {name: each for found in several for name, each in found.biases.items()}
        tensors |= {f"{name}.weight.codes": value for name, value in codes.items()}
        tensors |= {f"{name}.weight.scale": value for name, value in weight_scales.items()}
        tensors |= {f"{name}.activation.scale": value for name, value in scales.items()}
        tensors |= {f"{name}.bias": value for name, value in biases.items()}
        layers = {}
        for name, layer in self.bundle.strategy.layers.items():
            layers[name] = layer.model_copy(
                update={
                    "weight": _tuned(layer.weight, name in codes),
                    "activation": _tuned(layer.activation, name in scales),
                    "bias_corrected": layer.bias_corrected or name in biases,
                }
            )
        record = {
            "settings": {
                **asdict(self.settings),
                "blocks": list(self.settings.blocks),
                "augment": [name_of(step) for step in self.settings.augment],
            },
            "seed": self.seed,
            "inputs": len(self.samples),
            "blocks": {name: _plain(errors) for name, errors in self.errors.items()},
            "left": self.left,
        }
        if self.network is not None:
            record["network"] = _plain(self.network)
        strategy = self.bundle.strategy.model_copy(update={"layers": layers, "repair": record})
        return Bundle(strategy.model_copy(update={"tensors_sha256": None}), tensors)


def _tuned(choice: TensorChoice | None, now: bool) -> TensorChoice | None:
    return choice.model_copy(update={"tuned": True}) if choice is not None and now else choice


def _plain(errors: UnitErrors | NetworkErrors) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(errors).items()}


def _told(unit: Unit, errors: UnitErrors, position: int, count: int) -> str:
    before, after = errors.held_out if any(errors.held_out) else errors.learned
    what = f"{before:.3g} -> {after:.3g}" if errors.kept else f"{before:.3g}, not better and left as it was"
    return f"repaired {position + 1}/{count} {unit.name}: relative error on held-out inputs {what}"
