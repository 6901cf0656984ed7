"""Plans a merge: which tensors of a base model change, and the blocks of rows they become.

Everything that cannot be merged is refused when the plan is made, before a file is written.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora import formats
from linlora.formats.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, WrongBaseError
from linlora.formats.model_config import read_head_config
from linlora.fusion.dense import DenseTies
from linlora.fusion.layerwise import order_of_values
from linlora.layers.sharing import group_of
from linlora.layers.weights import BLOCK, Update, blocks, folded
from linlora.storage.files import write_text
from linlora.storage.tensor_files import TensorFile
from linlora.storage.tensors import finite, shapes
from linlora.vectors.factors import factors_of


class Plan:
    """The tensors of a base model that a merge changes, replaces or adds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[formats.Stored],
        changes: Sequence[formats.Stored],
        dense: DenseTies | None,
    ) -> None:
        self.folds: dict[str, list[tuple[Path, Callable[[], Update]]]] = defaultdict(list)
        self.indices: dict[str, list[int]] = defaultdict(list)
        self.dense = dense
        self.replacements: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
        self.groups: dict[str, set[str]] = {}
        self.added: dict[str, Tensor] = {}  # keys that the base lacks, or has of another shape
        self.last = list(checkpoint.files)[-1]
        self.head: dict[str, Any] = {}
        for index, change in enumerate(changes):
            placed = checkpoint.place(change.layer_sizes())
            for layer, (key, transposed) in placed.items():
                self.folds[key].append((change.path, _reader(change, layer, transposed)))
                self.indices[key].append(index)
        for adapter in adapters:
            self._replace(checkpoint, adapter)
        for key in self.folds.keys() & self.replacements.keys():
            own = self.replacements[key][0]  # with a LoRA of an output embedding PEFT saves the weight it is added to
            if other := next((path for path, _ in self.folds[key] if path != own), None):
                raise ValueError(
                    f"'{key}' was trained as a whole beside {own}, and {other} changes it; merge one of the adapters, "
                    "or train both alike"
                )
        self._refuse_tied(checkpoint)

    def _replace(self, checkpoint: Checkpoint, adapter: formats.Stored) -> None:
        keys = checkpoint.keys([f"{layer}.weight" for layer in adapter.vector.scalings] + list(adapter.extras))
        extras = {keys[name]: name for name in adapter.extras}
        head = read_head_config(adapter.path)
        for name, like in shapes(adapter.extras).items():
            key = keys[name]
            there = checkpoint.entry(key).shape if key in checkpoint.home else None
            if there is None and self._is_copy_of_tied(checkpoint, adapter, key, extras):
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
                    f"'{name}' was trained beside {self.replacements[key][0]} and beside {adapter.path}, and a model "
                    "has one; merge one of the adapters, or remove the head from one"
                )
            self.head |= head or {}
            self.replacements[key] = (adapter.path, functools.partial(adapter.extras.__getitem__, name))
            self.groups[key] = group_of(key, checkpoint.tied) & extras.keys() | {key}

    def _is_copy_of_tied(
        self, checkpoint: Checkpoint, adapter: formats.Stored, key: str, extras: dict[str, str]
    ) -> bool:
        """Whether a tensor that the base lacks is the adapter's copy of one that the model ties it to."""
        twins = [twin for twin in group_of(key, checkpoint.tied) if twin in checkpoint.home and twin in extras]
        return any(torch.equal(adapter.extras[extras[key]], adapter.extras[extras[twin]]) for twin in twins)

    def _refuse_tied(self, checkpoint: Checkpoint) -> None:
        """Refuse what would change a weight that the model shares; all its names may be given one new value."""
        for key in self.folds.keys() | self.replacements.keys():
            together = self.groups.get(key, {key}) if key not in self.folds else {key}
            others = sorted(group_of(key, checkpoint.tied) - together)
            if others:
                path = self.folds[key][0][0] if key in self.folds else self.replacements[key][0]
                raise WrongBaseError(
                    f"'{key}' is changed by {path}, and in {checkpoint.folder} it is tied to '{others[0]}', which "
                    "would change too; load the adapter with PEFT and save linlora.merge(model), or serve base and "
                    "adapter unmerged"
                )

    def grows(self, file: TensorFile, name: str) -> bool:
        """Whether a shard gets tensors that do not fit its places."""
        return any(key in file.entries for key in self.added) or (name == self.last and bool(self.added))

    def describe(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Name the class of the head, and its classes, in the configuration; and what is added, in the index."""
        if self.head and checkpoint.config:
            write_text(folder / CONFIG_FILE, json.dumps(checkpoint.config | self.head, indent=2) + "\n")
        if (new := self.added.keys() - checkpoint.home.keys()) and checkpoint.index is not None:
            index = dict(checkpoint.index)
            index["weight_map"] = index["weight_map"] | dict.fromkeys(sorted(new), self.last)
            index["metadata"] = {k: v for k, v in index.get("metadata", {}).items() if k != "total_size"}  # another now
            write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def merged(self, file: TensorFile, key: str) -> Iterator[Tensor]:
        """The tensor of a key in the merged model, in blocks of rows."""
        like = self.added[key] if key in self.added else file.like(key)
        read_rows: Callable[[slice], Tensor] = functools.partial(file.read_rows, key)
        if key in self.replacements:
            replacement = self.replacements[key][1]().to(like.dtype).contiguous()
            if not finite(replacement):
                raise ValueError(f"'{key}', trained beside {self.replacements[key][0]}, is not finite in {like.dtype}")
            if key not in self.folds:
                yield replacement
                return
            read_rows = replacement.__getitem__
        if not like.is_floating_point() or like.element_size() == 1:
            raise ValueError(
                f"'{key}' is {like.dtype}: a quantized weight, in whose rounding ΔW would be lost; merge into the "
                "original weights"
            )
        updates = [read() for _, read in self.folds[key]]
        order = order_of_values(updates)  # so that the order of the adapters changes no bit
        indices, updates = [self.indices[key][i] for i in order], [updates[i] for i in order]
        if self.dense is not None:
            yield from self._dense(self.dense, key, indices, updates, like, read_rows)
            return
        A, B = torch.cat([update.A for update in updates]), torch.cat([update.B for update in updates], dim=1)
        wide = torch.promote_types(A.dtype, like.dtype)
        update = Update(A.to(wide), B.to(wide), updates[0].transposed)
        for rows in blocks(like.shape):
            try:
                yield folded(read_rows(rows), update, rows)
            except OverflowError as error:
                raise ValueError(f"'{key}': {error}") from error

    def _dense(
        self,
        ties: DenseTies,
        key: str,
        indices: Sequence[int],
        updates: Sequence[Update],
        like: Tensor,
        read_rows: Callable[[slice], Tensor],
    ) -> Iterator[Tensor]:
        """round(W + ΔW) of a ΔW that has no factors."""
        for rows in blocks(like.shape):
            change = ties.rows(updates, indices, rows)
            block = (read_rows(rows).to(torch.promote_types(change.dtype, like.dtype)) + change).to(like.dtype)
            if not finite(block):
                raise ValueError(f"'{key}': W + ΔW overflows in {like.dtype}; a smaller scaling is needed")
            yield block


def _is_untouched(file: TensorFile, key: str, tensor: Tensor) -> bool:
    """Whether a tensor is the base's, rounded to its dtype."""
    if tensor.dim() == 0:
        return bool(file.read(key).to(tensor.dtype) == tensor)
    height = max(1, tensor.shape[0] * BLOCK // max(1, tensor.numel()))
    blocks = (slice(at, min(at + height, tensor.shape[0])) for at in range(0, tensor.shape[0], height))
    return all(torch.equal(file.read_rows(key, rows).to(tensor.dtype), tensor[rows]) for rows in blocks)


def _reader(adapter: formats.Stored, layer: str, transposed: bool) -> Callable[[], Update]:
    def read() -> Update:
        A, B = factors_of(adapter.vector, layer)
        return Update(A, adapter.vector.scalings[layer] * B, transposed)

    return read
