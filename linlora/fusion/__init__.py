"""Fusion: many task vectors of one linearization point, or in weight space, into one.

A method is a small function from vectors to a vector, with its published defaults as keyword arguments; `METHODS` is
the registry of them and `linlora.fuse` calls one by its name. What it does with one tensor is a `rule`, in weight space
what it does with the ΔW of one layer (`layerwise`), so the vectors may lie in files. `search` tries the options of a
method on a validation split. `linlora.fusion.analysis` measures how vectors interfere, `linlora.fusion.figures` draws
it.
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
