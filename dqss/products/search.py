"""Products under search: their candidates, and what they are observed with while calibrating."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqss.choice import OPERANDS
from dqss.decision import Decision
from dqss.mixed import MixedActivation, Mode
from dqss.products.attach import ProductQuantizer, attach_products, detach_products
from dqss.products.find import Place, ProductFinder
from dqss.products.multiply import HIDDEN, Kind, Product, as_product
from dqss.space import LayerInfo, SearchSpace, product_info
from dqss.spec import Candidate


@dataclass
class SearchableProduct:
    """A product under search.

    Attributes:
        info: its name, and that it is a product.
        owner: the module in whose forward it is.
        index: its position there.
        quantizer: holds a mixed quantizer for each of its operands.
    """

    info: LayerInfo
    owner: nn.Module
    index: int
    quantizer: ProductQuantizer

    @property
    def kind(self) -> Kind:
        """As in :class:`dqss.choice.ProductStrategy`."""
        kind: Any = self.quantizer.kind
        found: Kind = kind
        return found

    def operands(self) -> Iterator[tuple[str, MixedActivation]]:
        """What quantizes each operand, by its name."""
        for name, quantizer in self.quantizer.operands.items():
            assert isinstance(quantizer, MixedActivation)
            yield name, quantizer


class ProductSearch:
    """Finds products while a float network is calibrated, and observes those that are searched.

    Args:
        model: the network; nothing is attached to it before :meth:`attach`.
        space: says which products are searched, among which candidates.
        created: called with a label for people and each new quantizer of an operand.
    """

    def __init__(
        self, model: nn.Module, space: SearchSpace, created: Callable[[str, nn.Module], None]
    ) -> None:
        self._space, self._created = space, created
        self._finder = ProductFinder(model, self._see, as_product, "product")
        self._quantizers: dict[Place, ProductQuantizer | None] = {}
        self._attached: set[str] = set()

    def watching(self, batch: int) -> AbstractContextManager[None]:
        """To be around the forward pass of a batch; one is enough if nothing is to be observed."""
        return self._finder.watching() if self._space.products or batch == 0 else nullcontext()

    def infos(self) -> list[LayerInfo]:
        """All products that were found, as a search space looks at them."""
        return [product_info(place.name) for place in self._finder.found()]

    def attach(self) -> dict[str, SearchableProduct]:
        """Put the observed quantizers in place."""
        found: dict[str, SearchableProduct] = {}
        by_owner: dict[nn.Module, dict[int, ProductQuantizer]] = {}
        for place, quantizer in self._quantizers.items():
            if quantizer is not None and self._finder.searchable(place):
                product = SearchableProduct(product_info(place.name), place.owner, place.index, quantizer)
                for _, operand in product.operands():
                    operand.mode = Mode.FLOAT
                found[place.name] = product
                by_owner.setdefault(place.owner, {})[place.index] = quantizer
        for owner, products in by_owner.items():
            attach_products(owner, products)
        self._attached = set(found)
        return found

    def skipped(self) -> list[str]:
        """Products that the rules of the search space leave in float."""
        return [place.name for place, quantizer in self._quantizers.items() if quantizer is None]

    def left(self) -> list[str]:
        """Products in float for another reason: they are not searched at all, or cannot be."""
        known = self._attached.union(self.skipped())
        return [place.name for place in self._finder.found() if place.name not in known]

    @torch.no_grad()
    def _see(self, place: Place, product: Product) -> None:
        if not self._space.products:
            return
        if place not in self._quantizers:
            candidates = self._space.product_candidates(product_info(place.name))
            create = None if candidates is None else self._create(place.name, product, candidates)
            self._quantizers[place] = create
        quantizer = self._quantizers[place]
        if quantizer is not None:
            product.show(quantizer.quantize)

    def _create(self, name: str, product: Product, candidates: tuple[Candidate, ...]) -> ProductQuantizer:
        assert product.kind != HIDDEN, name
        operands: dict[str, MixedActivation] = {}
        for operand in OPERANDS[product.kind]:
            decision = Decision(f"{name}.{operand}", candidates)
            # Per tensor: the shape does not matter.
            operands[operand] = MixedActivation(candidates, decision, torch.Size([1]))
            operands[operand].mode = Mode.OBSERVE
            self._created(f"{operand} of product {name!r}", operands[operand])
        first: Tensor = product.given[0]
        return ProductQuantizer(name, product.kind, operands).to(first.device)


def forget(products: dict[str, SearchableProduct]) -> None:
    """Take all products off their modules."""
    for owner in {product.owner: None for product in products.values()}:
        detach_products(owner, [product.quantizer for product in products.values()])
    products.clear()
