"""Adapters merged into a base model from file to file: the model is never built, a block of rows is in memory.

The shards of the base are gone through in the order of their bytes. Of an adapted weight a block of rows is read,
W + Σ ΔW is summed in float32 and rounded once (linlora.layers.weights), and handed to a second thread, which writes
it; a third flushes it to the disk. Everything between two weights is copied by the kernel. The folder appears under its
name when it is whole.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora import formats
from linlora.formats.base_folder import beside_the_weights
from linlora.formats.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, WrongBaseError
from linlora.formats.model_config import read_head_config
from linlora.fusion.checks import check_options
from linlora.fusion.dense import DenseTies
from linlora.fusion.registry import FROM_VECTORS, METHODS, fuse, needs
from linlora.layers.sharing import group_of
from linlora.layers.vanilla import refuse_changed_base
from linlora.layers.weights import BLOCK, Update, blocks, folded, one_thread
from linlora.storage.files import install_file, write_text
from linlora.storage.staging import unfinished_folder
from linlora.storage.tensor_files import StoredTensors, TensorFile, finite, memory, save_tensors, shapes, write
from linlora.vectors.weight_vector import factors_of

_FLUSH = 2**27
"""Bytes after which what is written goes to the disk, beside the work; all of it at the end would be waited for."""


@dataclass(frozen=True)
class Merged:
    """What `merge_files` did. `left_out` names files of the base that are not in the merged folder."""

    folder: Path
    folded: int
    replaced: int
    tensors: int
    nbytes: int
    left_out: tuple[str, ...] = ()


def merge_files(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    progress: Callable[[Sequence[str]], Iterator[str]] = iter,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Merged:
    """Write the model that a base and adapters make together, as a folder that transformers loads.

    Args:
        base: folder of a model, safetensors in one file or in shards, as transformers writes them.
        adapters: files or folders of any format of `linlora.formats`; their ΔW are summed. What was trained beside an
            adapter (a head) replaces the base's, or is added to it: where the adapter's `model_config` says of which
            class of model it is, the merged model is of that class and has its class names.
        out: the folder to write; it must not exist, or be empty.
        progress: goes through the names of the shards.
        weights: what each ΔW is multiplied by, 1 if left out.
        method, options: of `linlora.fuse`, which makes one vector in weight space of them, layer by layer, instead of
            the sum.

    Raises, and writes nothing: FileExistsError; WrongBaseError where base and adapter do not fit; ValueError for no
    adapter, a quantized base, a vector of scope "model", one without its point, weights that overflow;
    CorruptFileError.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert", trained=True)
    >>> model.save_pretrained("adapter")
    >>> linlora.testing.tiny_base("bert").save_pretrained("base")
    >>> merge_files("base", ["adapter"], "merged").folded
    11
    """
    if not adapters:
        raise ValueError("merge: no adapters were given")
    folder, out = Path(out), Path(out).resolve()  # the folder a link names is replaced, not the link
    if out == Path.cwd() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{folder} exists already; choose another folder, or remove it")
    checkpoint = Checkpoint(Path(base))
    stored = [formats.open(path) for path in adapters]
    for adapter in stored:
        refuse_changed_base(adapter.vector.changed_base, str(adapter.path))
    changes, dense = stored, None
    if weights is not None or method is not None:
        changes, dense = _fused(stored, weights, method, options or {})
    plan = _Plan(checkpoint, stored, changes, dense)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, left_out = beside_the_weights(checkpoint.folder, {*checkpoint.files, INDEX_FILE})
    beside += [Path(INDEX_FILE)] if checkpoint.index is not None else []
    with unfinished_folder(out) as staging:
        for path in beside:
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / path, staging / path)
        plan.describe(checkpoint, staging)
        # a block keeps one thread busy for a millisecond, and the other core is the writing thread's
        with one_thread(), _Queue() as flushing, _Queue(3) as writing:
            for name in progress(list(checkpoint.files)):
                file = checkpoint.files[name]
                if plan.grows(file, name):
                    _save_shard(file, plan, staging / name)
                else:
                    _write_shard(file, plan, staging / name, writing, flushing)
        os.chmod(staging, 0o755)
        os.replace(staging, out)
    nbytes = sum(e.stop - e.start for file in checkpoint.files.values() for e in file.entries.values())
    return Merged(
        folder,
        len(plan.folds),
        len(plan.replacements),
        len(plan.added.keys() | checkpoint.home.keys()),
        nbytes,
        tuple(map(str, left_out)),
    )


class _Plan:
    """What becomes of each tensor of the base."""

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
        """Whether a tensor the base has not is what the adapter holds for one that the model ties it to."""
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
        if self.dense is not None:
            yield from self._dense(self.dense, key, updates, like, read_rows)
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
        self, ties: DenseTies, key: str, updates: Sequence[Update], like: Tensor, read_rows: Callable[[slice], Tensor]
    ) -> Iterator[Tensor]:
        """round(W + ΔW) of a ΔW that has no factors."""
        for rows in blocks(like.shape):
            change = ties.rows(updates, self.indices[key], rows)
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


def _fused(
    adapters: Sequence[formats.Stored], weights: Sequence[float] | None, method: str | None, options: Mapping[str, Any]
) -> tuple[list[formats.Stored], DenseTies | None]:
    """Adapters as one, whose layers are computed when they are asked for; for TIES all of them, and the rule."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"merge: {len(weights)} weights for {len(adapters)} adapters; one each is needed")
    if method in METHODS and method not in FROM_VECTORS:
        raise ValueError(
            f"merge: {method} needs {needs(method)} of the tasks, which adapters do not hold; from files: "
            f"{', '.join(FROM_VECTORS)}"
        )
    vectors = [  # all of the base that is given, whatever name they record
        replace(weight * adapter.vector.cast("weight"), base_model=None)
        for weight, adapter in zip(weights, adapters, strict=True)
    ]
    if method == "ties":
        check_options(method, METHODS[method], options)
        changes = [replace(adapter, vector=vector) for adapter, vector in zip(adapters, vectors, strict=True)]
        return changes, DenseTies(vectors, **options)
    sum_of = {"scaling": 1.0} if method is None else {}
    fused = fuse(vectors, method or "task_arithmetic", **sum_of, **options)
    return [formats.Stored(Path(" + ".join(str(adapter.path) for adapter in adapters)), "fused adapters", fused)], None


def _reader(adapter: formats.Stored, layer: str, transposed: bool) -> Callable[[], Update]:
    def read() -> Update:
        A, B = factors_of(adapter.vector, layer)
        return Update(A, adapter.vector.scalings[layer] * B, transposed)

    return read


def _write_shard(file: TensorFile, plan: _Plan, path: Path, writing: _Queue, flushing: _Queue) -> None:
    """The shard with its adapted tensors changed: the same header, the same places."""
    changed = plan.folds.keys() | plan.replacements.keys()
    out = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by the flushing thread)
    done = 0
    for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start):
        if name in changed:
            writing.put(file.copy, done, entry.start, out.fileno())
            for block in plan.merged(file, name):
                writing.put(write, out, memory(block))
            if entry.stop // _FLUSH > done // _FLUSH:
                writing.put(flushing.put, os.fsync, out.fileno())
            done = entry.stop
    writing.put(file.copy, done, file.size, out.fileno())
    writing.put(flushing.put, out.close)
    writing.put(flushing.put, install_file, path, path)


def _save_shard(file: TensorFile, plan: _Plan, path: Path) -> None:
    """The shard with other tensors in it than it had: all of it is written, one tensor at a time."""
    like = {name: file.like(name) for name in file.entries}
    like |= {name: tensor for name, tensor in plan.added.items() if name in like or path.name == plan.last}
    changed = plan.folds.keys() | plan.replacements.keys()
    tensors = StoredTensors(
        like, lambda name: torch.cat(list(plan.merged(file, name))) if name in changed else file.read(name)
    )
    save_tensors(path, tensors, {"format": "pt", **file.metadata})


class _Queue:
    """Jobs for another thread, in their order, `limit` at most waiting; what one raises, `put` or the end raises."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit

    def __enter__(self) -> _Queue:
        self.thread, self.waiting = ThreadPoolExecutor(1), deque[Future[None]]()
        return self

    def put(self, job: Callable[..., None], *arguments: Any) -> None:
        self.waiting.append(self.thread.submit(job, *arguments))
        while self.limit is not None and len(self.waiting) > self.limit:
            self.waiting.popleft().result()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown(cancel_futures=error is not None)
        while self.waiting and error is None:
            self.waiting.popleft().result()
