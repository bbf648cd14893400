"""Products of two activations: what they are, where they are, and how their operands are quantized."""

from dqss.products.attach import ProductQuantizer, attach_products, can_attach
from dqss.products.search import ProductSearch, SearchableProduct, forget

__all__ = [
    "ProductQuantizer",
    "ProductSearch",
    "SearchableProduct",
    "attach_products",
    "can_attach",
    "forget",
]
