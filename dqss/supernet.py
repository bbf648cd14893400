"""The supernet: a prepared network with a decision at every searchable tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dqss import integers, pooling, quantizers, stem
from dqss.attach import (
    attach_input,
    attach_weight,
    detach_input,
    detach_weight,
    forbid_nested,
    original_weight,
)
from dqss.calibration import naming, probe
from dqss.calls import call_model
from dqss.coverage import Coverage
from dqss.decision import Decision, OneHot, Relaxation, draw_all
from dqss.errors import SearchSpaceError
from dqss.fitting import Moments, can_fit, watching
from dqss.layers import input_shape, searchable_layers
from dqss.losses import Distance
from dqss.mixed import Found, MixedActivation, MixedQuantizer, MixedWeight, Mode, calibrate_all
from dqss.points import PointSearch, SearchablePoint
from dqss.points import forget as forget_points
from dqss.products import ProductSearch, SearchableProduct, forget
from dqss.randomness import generator_for
from dqss.remaking import Remaking
from dqss.space import LayerCandidates, LayerInfo, SearchSpace

Assignment = Mapping[str, int]
"""The chosen option of each decision, by the decision's name."""


@dataclass
class SearchableLayer:
    """A layer under search: what quantizes its weight and its input (None: stays in float)."""

    info: LayerInfo
    module: nn.Module
    weight: MixedWeight | None
    activation: MixedActivation | None


class Supernet(nn.Module):
    """Decisions on a frozen network.

    Build it, then :meth:`calibrate`; after that the forward pass follows :meth:`mode`.
    The network stays in ``eval()`` and its parameters do not require gradients.

    Args:
        model: a prepared network; it is changed in place.
        space: which layers, which candidates.
    """

    weight_type: ClassVar[type[MixedWeight]] = MixedWeight
    activation_type: ClassVar[type[MixedActivation]] = MixedActivation
    trains: ClassVar[bool] = False
    """Whether weights and quantizers learn."""

    def __init__(self, model: nn.Module, space: SearchSpace) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        forbid_nested(model)
        for module in model.modules():
            pooling.hasten(module)
        self.space = space
        self._remaking = Remaking()
        self.layers: dict[str, SearchableLayer] = {}
        self.products: dict[str, SearchableProduct] = {}
        self.points: dict[str, SearchablePoint] = {}
        self._followers: dict[MixedQuantizer, list[MixedQuantizer]] = {}
        self.coverage = Coverage()
        self.preparation: list[Moments] = []
        found = searchable_layers(model)
        self._infos = [info for _, info in found.values()]
        if not (space.products or space.points):  # which are known once the network has run
            space.check(self._infos)
        by_weight: dict[int, tuple[str, MixedWeight]] = {}
        for name, (module, info) in found.items():
            candidates = space.candidates(info)
            if candidates is None:
                self.coverage.skipped.append(name)
            else:
                self.layers[name] = self._attach(module, info, candidates, by_weight)

    def _attach(
        self,
        module: nn.Module,
        info: LayerInfo,
        candidates: LayerCandidates,
        by_weight: dict[int, tuple[str, MixedWeight]],
    ) -> SearchableLayer:
        weight = activation = None
        self._check_frozen(info, candidates)
        if candidates.weight:
            parameter = original_weight(module)
            if id(parameter) in by_weight:
                owner, weight = by_weight[id(parameter)]
                self._note_tie(owner, info.name)
            else:
                decision = Decision(f"{info.name}.weight", candidates.weight)
                weight = self.weight_type(candidates.weight, decision, parameter.shape)
                by_weight[id(parameter)] = (info.name, weight)
            attach_weight(module, weight)
        if candidates.activation:
            decision = Decision(f"{info.name}.activation", candidates.activation)
            activation = self.activation_type(candidates.activation, decision, input_shape(module, info))
            attach_input(module, activation)
            stem.hasten(module)
        if weight is not None and activation is not None:
            integers.hasten(module, weight, activation)
        return SearchableLayer(info, module, weight, activation)

    def _check_frozen(self, info: LayerInfo, candidates: LayerCandidates) -> None:
        """Refuse what learns where nothing does, and what is rounded for good where weights learn."""
        found = next((c for c in (*candidates.weight, *candidates.activation) if quantizers.learns(c)), None)
        if found is not None and not self.trains:
            raise SearchSpaceError(
                f"search space {self.space.name!r}: {found.algorithm} for layer {info.name!r} learns with "
                "the network, which this search leaves as it is: use method=qat, or another algorithm"
            )

        fitted = next((c for c in candidates.weight if c.algorithm in quantizers.FITTED), None)
        if fitted is not None and self.trains:
            raise SearchSpaceError(
                f"search space {self.space.name!r}: {fitted.algorithm} for layer {info.name!r} rounds "
                "weights before the search, and here they are trained: use method=ptq, or another algorithm"
            )

    def _note_tie(self, owner: str, name: str) -> None:
        group = next((names for names in self.coverage.tied if names[0] == owner), None)
        if group is None:
            self.coverage.tied.append([owner, name])
        else:
            group.append(name)

    # -- forward ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass, quantized as the mode says."""
        if not torch.is_grad_enabled():
            return self.model(*args, **kwargs)
        with self._remaking():
            return self.model(*args, **kwargs)

    def quantizers(self) -> Iterator[MixedQuantizer]:
        """Every mixed quantizer once, weights before inputs, in layer order; then of products and points."""
        seen: set[int] = set()
        for layer in self.layers.values():
            for quantizer in (layer.weight, layer.activation):
                if quantizer is not None and id(quantizer) not in seen:
                    seen.add(id(quantizer))
                    yield quantizer
        for several in (self.products, self.points):
            for each in several.values():
                yield from (quantizer for _, quantizer in each.operands())

    def named_quantizers(self) -> dict[str, MixedQuantizer]:
        """Every quantizer by the name of its tensor; a weight that several layers have, by each."""
        found: dict[str, MixedQuantizer] = {}
        for name, layer in self.layers.items():
            for role, quantizer in (("weight", layer.weight), ("activation", layer.activation)):
                if quantizer is not None:
                    found[f"{name}.{role}"] = quantizer
        for several in (self.products, self.points):
            for name, each in several.items():
                found |= {f"{name}.{operand}": quantizer for operand, quantizer in each.operands()}
        return found

    @contextmanager
    def mode(self, mode: Mode | str) -> Iterator[None]:
        """Run everything inside as ``"float"``, ``"relaxed"`` or ``"discrete"``."""
        before, mode = [(quantizer, quantizer.mode) for quantizer in self.quantizers()], Mode(mode)
        for quantizer, _ in before:
            quantizer.switch(mode)
        try:
            yield
        finally:
            for quantizer, previous in before:
                quantizer.switch(previous)

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Run everything inside in ``network``, one made from this one's that takes the same inputs."""
        own, self.model = self.model, network
        try:
            yield
        finally:
            self.model = own

    # -- decisions ----------------------------------------------------------------------------

    @property
    def decisions(self) -> dict[str, Decision]:
        """The unique decisions, sorted by name."""
        unique = {quantizer.decision.name: quantizer.decision for quantizer in self.quantizers()}
        return dict(sorted(unique.items()))

    def arch_parameters(self) -> list[nn.Parameter]:
        """The logits of the unique decisions, sorted by name."""
        return [decision.logits for decision in self.decisions.values()]

    def network_parameters(self) -> list[nn.Parameter]:
        """Every other parameter; disjoint from :meth:`arch_parameters` and exhaustive with it."""
        logits = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in logits]

    def relax(self, relaxation: Relaxation) -> None:
        """Use ``relaxation`` in every decision."""
        for decision in self.decisions.values():
            decision.relax(relaxation)

    def draw(self, seed: int, step: int) -> None:
        """Draw the noise of one step: a function of seed, step and decision name only."""
        decisions = self.decisions
        draw_all(list(decisions.values()), [generator_for(seed, step, name) for name in decisions])

    def argmax(self) -> dict[str, int]:
        """The assignment that the logits prefer."""
        return {name: int(decision.logits.detach().argmax()) for name, decision in self.decisions.items()}

    @contextmanager
    def assign(self, assignment: Assignment) -> Iterator[None]:
        """Discrete mode with ``assignment`` in place of the logits' own choice."""
        decisions = self.decisions
        before = {name: decision.assigned for name, decision in decisions.items()}
        try:
            for name, index in assignment.items():
                decisions[name].assigned = index
            with self.mode(Mode.DISCRETE):
                yield
        finally:
            for name, decision in decisions.items():
                decision.assigned = before[name]

    @contextmanager
    def pinned(self, assignment: Assignment) -> Iterator[None]:
        """Relaxed mode with one-hot weights at ``assignment`` whose gradients reach the logits.

        The forward pass is that of :meth:`assign`; see :class:`dqss.decision.OneHot`.
        """
        decisions = self.decisions
        before = {name: decision.relaxation for name, decision in decisions.items()}
        try:
            for name, decision in decisions.items():
                decision.relaxation = OneHot(assignment[name])
            with self.mode(Mode.RELAXED):
                yield
        finally:
            for name, decision in decisions.items():
                decision.relaxation = before[name]

    # -- calibration --------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(
        self,
        batches: Iterable[Any],
        seen: Callable[[int, Any], None] = lambda index, output: None,
        probes: Iterable[Any] = (),
        distance: Distance | None = None,
    ) -> None:
        """Calibrate all candidates of all layers and products in one pass over ``batches``.

        Layers that no batch reaches are left in float and listed in :attr:`coverage`. Products of
        two activations are found on the way; those that the search space searches get decisions.
        Points are found in a pass of their own over the first batch, where the search space has some.

        Args:
            batches: inputs as :func:`dqss.calls.call_model` takes them.
            seen: called with each batch's position and the float network's output.
            probes: inputs for a second pass, forward and backward, which is made only where
                :attr:`needs_gradients`; see :func:`dqss.calibration.probe`.
            distance: whose curvature that pass measures; see there.

        Raises:
            NonFiniteError: naming the layer whose input is NaN or infinite.
            SearchSpaceError: if no layer under search is used at all, or probes are missing.
        """
        forget(self.products)
        forget_points(self.points)
        self.coverage.ties = []
        for quantizer in self.quantizers():
            quantizer.calls = 0
        observers = {
            f"input of layer {name!r}": layer.activation
            for name, layer in self.layers.items()
            if layer.activation is not None
        }
        fitting = self._fitting()
        with self.mode(Mode.OBSERVE), naming(observers) as name_observer:
            search = ProductSearch(self.model, self.space, name_observer)
            points = PointSearch(self.model, self.space, self.layers, name_observer)
            for index, batch in enumerate(batches):
                if index == 0 and self.space.points:
                    with self.mode(Mode.FLOAT):  # on a copy: networks may write to their inputs
                        points.find(tree_map_only(Tensor, torch.clone, batch))
                with watching(fitting), search.watching(index), points.watching():
                    output = call_model(self.model, batch)
                seen(index, output)
        self._drop_unused()
        self._keep(search, points)
        if self.needs_gradients:
            with self.mode(Mode.PROBE):
                if not probe(self.model, self.quantizers(), probes, distance):
                    raise SearchSpaceError(
                        f"search space {self.space.name!r} has candidates that need gradients: "
                        "give calibrate() inputs to probe them with"
                    )
        calibrate_all(self._found())
        weights = {id(w): (w, layer) for layer in self.layers.values() if (w := layer.weight) is not None}
        calibrate_all((w, w.found(original_weight(layer.module))) for w, layer in weights.values())
        self.recognize()

    def _found(self) -> Iterator[tuple[MixedQuantizer, Found]]:
        """What each quantizer of an activation is calibrated with; of one tensor, all with the same."""
        followers = {id(follower) for several in self._followers.values() for follower in several}
        for quantizer in self.quantizers():
            if isinstance(quantizer, MixedActivation) and id(quantizer) not in followers:
                found = quantizer.found()
                yield quantizer, found
                yield from ((follower, found) for follower in self._followers.get(quantizer, ()))

    def _fitting(self) -> dict[str, tuple[nn.Module, Moments]]:
        """Layers with candidates that are rounded to fit their inputs, as far as they can be."""
        found: dict[str, tuple[nn.Module, Moments]] = {}
        for name, layer in self.layers.items():
            if layer.weight is None or not layer.weight.needs_inputs:
                continue
            if not can_fit(layer.module):
                self.coverage.plain += [name] if name not in self.coverage.plain else []
                continue
            layer.weight.moments = layer.weight.moments or Moments()
            found[name] = layer.module, layer.weight.moments
        self.preparation = [moments for _, moments in found.values()]
        return found

    def recognize(self) -> None:
        """Tell the decisions which options have come to the same; ties need it of all they rule."""
        found: dict[str, list[list[int]]] = {}
        for quantizer in self.quantizers():
            found.setdefault(quantizer.decision.name, []).append(quantizer.outcome())
        for name, decision in self.decisions.items():
            decision.recognize(list(zip(*found[name], strict=True)))

    @property
    def needs_gradients(self) -> bool:
        """Whether some candidate weighs errors by gradients."""
        return any(quantizer.needs_gradients for quantizer in self.quantizers())

    def _drop_unused(self) -> None:
        for name, layer in list(self.layers.items()):
            weight_read = layer.weight is not None and layer.weight.calls > 0
            if layer.activation is not None and not layer.activation.observed:
                detach_input(layer.module)
                layer.activation = None
                if weight_read:
                    self.coverage.weight_only.append(name)
            if layer.weight is not None and not weight_read:
                detach_weight(layer.module)
                layer.weight = None
                if layer.activation is not None:
                    layer.activation.bypass = None
            if layer.weight is None and layer.activation is None:
                self.coverage.unused.append(name)
                del self.layers[name]

    def _keep(self, search: ProductSearch, points: PointSearch) -> None:
        if self.space.products or self.space.points:
            infos = search.infos() if self.space.products else []
            self.space.check([*self._infos, *infos, *points.infos()])
        self._keep_products(search)
        self.points = points.attach()
        self.coverage.skipped += [name for name in points.skipped if name not in self.coverage.skipped]
        self.coverage.hidden_points = points.hidden()
        self._followers = {}
        named = self.named_quantizers()
        for names in points.of_one_tensor(named):
            first, *others = (named[name] for name in names)
            alike = [other for other in others if other.decision.options == first.decision.options]
            for other in alike:
                other.decision = first.decision
            self._followers[first] = alike
            tied = [name for name in names if named[name].decision is first.decision]
            self.coverage.ties += [tied] if alike else []
        if not (self.layers or self.products or self.points):
            raise SearchSpaceError("none of the layers under search is used by the calibration inputs")

    def _keep_products(self, search: ProductSearch) -> None:
        self.products = search.attach()
        skipped = self.coverage.skipped
        skipped += [name for name in search.skipped() if name not in skipped]
        if self.space.products:
            self.coverage.hidden_products = search.left()
        else:
            self.coverage.products = search.left()
