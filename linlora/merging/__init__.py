"""Merges adapters into the weights of a base model: a model in memory, or from file to file."""

from linlora.merging.files import Merged, merge_files

__all__ = ["Merged", "merge_files"]
