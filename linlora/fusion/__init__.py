"""Fusion: many task vectors, of one linearization point or in weight space, become one.

A method is a small function from vectors to a vector, with its published defaults as keyword arguments; `METHODS` is
the registry of them, `linlora.fuse` calls one by its name, and `needs` says which want data. Vectors of one point are
fused tensor by tensor (`tensorwise`), in weight space layer by layer (`layerwise`), so they may lie in files. `search`
tries the options of a method on a validation split. `linlora.fusion.analysis` measures how vectors interfere,
`linlora.fusion.figures` draws it.
"""

from linlora.fusion.analysis import Disentanglement, cosines, disentanglement, predictor
from linlora.fusion.registry import METHODS, fuse, needs
from linlora.fusion.search import Search, grid, search

__all__ = [
    "METHODS",
    "Disentanglement",
    "Search",
    "cosines",
    "disentanglement",
    "fuse",
    "grid",
    "needs",
    "predictor",
    "search",
]
