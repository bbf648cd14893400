"""Tensors that no layer reads, and that a runtime needs quantized: found, and put under search."""

from dqss.points.search import PointSearch, SearchablePoint, forget

__all__ = ["PointSearch", "SearchablePoint", "forget"]
