"""Plans a merge: which tensors of a base model change, and the blocks of rows they become.

A plan refuses adapters that do not fit when it is made, before a file is written.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linlora import formats
from linlora.formats.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, WrongBaseError
from linlora.formats.model_config import read_head_config
from linlora.fusion.dense import DenseTies
from linlora.fusion.layerwise import order_of_values
from linlora.layers.sharing import group_of
from linlora.layers.weights import Update, blocks, folded
from linlora.storage.files import write_json
from linlora.storage.tensor_files import TensorFile
from linlora.storage.tensors import finite, shapes
from linlora.vectors.factors import factors_of


class Change(NamedTuple):
    """The change of one weight by an adapter, by its place in the merge; `transposed` where it is stored (K, N)."""

    place: int
    adapter: formats.Stored
    layer: str
    transposed: bool

    def update(self) -> Update:
        A, B = factors_of(self.adapter.vector, self.layer)
        return Update(A, self.adapter.vector.scalings[self.layer] * B, self.transposed)


class Plan:
    """The tensors of a base model that a merge changes, replaces or adds.

    Attributes:
        changes: by key, what the adapters add to a weight.
        replacements: by key, the adapter beside which a tensor was trained as a whole, and its name there.
        changed: the keys of both.
        added: the tensors, without values, that the base lacks or has of another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[formats.Stored],
        changes: Sequence[formats.Stored],
        dense: DenseTies | None,
    ) -> None:
        self.checkpoint, self.dense = checkpoint, dense
        self.changes: dict[str, list[Change]] = defaultdict(list)
        self.replacements: dict[str, tuple[formats.Stored, str]] = {}
        self.added: dict[str, Tensor] = {}
        self.groups: dict[str, set[str]] = {}
        self.head: dict[str, Any] = {}
        self.last = list(checkpoint.files)[-1]
        for place, change in enumerate(changes):
            for layer, (key, transposed) in checkpoint.place(change.layer_sizes()).items():
                self.changes[key].append(Change(place, change, layer, transposed))
        for adapter in adapters:
            self._replace(adapter)
        for key in self.changes.keys() & self.replacements.keys():
            own = self.replacements[key][0].path  # with a LoRA of an output embedding PEFT saves the weight it adds to
            if other := next((change.adapter.path for change in self.changes[key] if change.adapter.path != own), None):
                raise ValueError(
                    f"'{key}' was trained as a whole beside {own}, and {other} changes it; merge one of the adapters, "
                    "or train both alike"
                )
        self.changed = self.changes.keys() | self.replacements.keys()
        self._refuse_tied()

    def _replace(self, adapter: formats.Stored) -> None:
        checkpoint = self.checkpoint
        keys = checkpoint.keys([f"{layer}.weight" for layer in adapter.vector.scalings] + list(adapter.extras))
        extras = {keys[name]: name for name in adapter.extras}
        head = read_head_config(adapter.path)
        for name, like in shapes(adapter.extras).items():
            key = keys[name]
            there = checkpoint.entry(key).shape if key in checkpoint.home else None
            if there is None and self._is_copy_of_tied(adapter, key, extras):
                continue
            if there != tuple(like.shape) and head and (there is None or len(like) == len(head.get("id2label", ()))):
                self.added[key] = like.to(checkpoint.dtype)
            elif there != tuple(like.shape):
                raise WrongBaseError(
                    f"'{name}' {tuple(like.shape)} was trained beside the adapter {adapter.path}, and "
                    f"{checkpoint.folder} has {'no such tensor' if there is None else f'one of {there}'} to replace (a "
                    "head of its own?): build the model with this head, load the adapter with PEFT and call "
                    "linlora.merge(model).save_pretrained(folder)"
                )
            elif _is_untouched(checkpoint.home[key], key, adapter.extras[name]):
                continue  # PEFT saves the embeddings of the base beside an adapter of one
            if key in self.replacements:
                raise ValueError(
                    f"'{name}' was trained beside {self.replacements[key][0].path} and beside {adapter.path}, and a "
                    "model has one; merge one of the adapters, or remove the head from one"
                )
            self.head |= head or {}
            self.replacements[key] = adapter, name
            self.groups[key] = group_of(key, checkpoint.tied) & extras.keys() | {key}

    def _is_copy_of_tied(self, adapter: formats.Stored, key: str, extras: dict[str, str]) -> bool:
        """Whether a tensor that the base lacks is the adapter's copy of one that the model ties it to."""
        tied = group_of(key, self.checkpoint.tied)
        twins = [twin for twin in tied if twin in self.checkpoint.home and twin in extras]
        return any(torch.equal(adapter.extras[extras[key]], adapter.extras[extras[twin]]) for twin in twins)

    def _refuse_tied(self) -> None:
        """Refuse to change a weight that the model shares, unless all its names are given one new value."""
        for key in self.changed:
            together = {key} if key in self.changes else self.groups[key]
            others = sorted(group_of(key, self.checkpoint.tied) - together)
            if others:
                adapter = self.changes[key][0].adapter if key in self.changes else self.replacements[key][0]
                raise WrongBaseError(
                    f"'{key}' is changed by {adapter.path}, and in {self.checkpoint.folder} it is tied to "
                    f"'{others[0]}', which would change too; load the adapter with PEFT and save linlora.merge(model), "
                    "or serve base and adapter unmerged"
                )

    def additions(self, file: TensorFile) -> dict[str, Tensor]:
        """The tensors, without values, for which a shard has no place: those the base lacks go to the last one."""
        is_last, home = file is self.checkpoint.files[self.last], self.checkpoint.home
        return {key: like for key, like in self.added.items() if key in file.entries or (is_last and key not in home)}

    def describe(self, folder: Path) -> None:
        """Name the class of the head and its classes in the configuration, and the added tensors in the index."""
        if self.head and self.checkpoint.config:
            write_json(folder / CONFIG_FILE, self.checkpoint.config | self.head)
        if (new := self.added.keys() - self.checkpoint.home.keys()) and self.checkpoint.index is not None:
            index = dict(self.checkpoint.index)
            index["weight_map"] = index["weight_map"] | dict.fromkeys(sorted(new), self.last)
            index["metadata"] = {k: v for k, v in index.get("metadata", {}).items() if k != "total_size"}  # another now
            write_json(folder / INDEX_FILE, index)

    def merged(self, file: TensorFile, key: str) -> Iterator[Tensor]:
        """The tensor of a key in the merged model, in blocks of rows."""
        like = self.added[key] if key in self.added else file.like(key)
        read_rows: Callable[[slice], Tensor] = functools.partial(file.read_rows, key)
        if key in self.replacements:
            adapter, name = self.replacements[key]
            replacement = adapter.extras[name].to(like.dtype).contiguous()
            if not finite(replacement):
                raise ValueError(f"'{key}', trained beside {adapter.path}, is not finite in {like.dtype}")
            if key not in self.changes:
                yield replacement
                return
            read_rows = replacement.__getitem__
        if not like.is_floating_point() or like.element_size() == 1:
            raise ValueError(
                f"'{key}' is {like.dtype}: a quantized weight, in whose rounding ΔW would be lost; merge into the "
                "original weights"
            )
        changed = self._sum(self.changes[key], like.dtype)
        for rows in blocks(like.shape):
            try:
                yield changed(read_rows(rows), rows)
            except OverflowError as error:
                raise ValueError(f"'{key}': {error}") from error

    def _sum(self, changes: Sequence[Change], dtype: torch.dtype) -> Callable[[Tensor, slice], Tensor]:
        """A function that makes round(W + ΔW) of a block of W and its rows, and raises OverflowError."""
        updates = [change.update() for change in changes]
        order = order_of_values(updates)  # so that the order of the adapters changes no bit
        updates, places = [updates[i] for i in order], [changes[i].place for i in order]
        if self.dense is None:
            A, B = torch.cat([update.A for update in updates]), torch.cat([update.B for update in updates], dim=1)
            wide = torch.promote_types(A.dtype, dtype)
            update = Update(A.to(wide), B.to(wide), updates[0].transposed)
            return lambda block, rows: folded(block, update, rows)
        ties = self.dense

        def dense(block: Tensor, rows: slice) -> Tensor:
            change = ties.rows(updates, places, rows)
            total = (block.to(torch.promote_types(change.dtype, dtype)) + change).to(dtype)
            if not finite(total):
                raise OverflowError(f"W + ΔW overflows in {dtype}; a smaller scaling is needed")
            return total

        return dense


def _is_untouched(file: TensorFile, key: str, tensor: Tensor) -> bool:
    """Whether a tensor is the base's, rounded to its dtype."""
    if tensor.dim() == 0:
        return bool(file.read(key).to(tensor.dtype) == tensor)
    parts = blocks((len(tensor), tensor.numel() // max(1, len(tensor))))
    return all(torch.equal(file.read_rows(key, rows).to(tensor.dtype), tensor[rows]) for rows in parts)
