"""Merges adapters into a base model from file to file: no model is built, one block of rows is in memory.

A plan (linlora.merging.plan) says what becomes of each tensor; the shards are written by it in the order of their bytes
(linlora.merging.shards). The folder appears under its name when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linlora import formats
from linlora.formats.base_folder import beside_the_weights
from linlora.formats.checkpoint import INDEX_FILE, Checkpoint
from linlora.fusion.checks import check_options
from linlora.fusion.dense import DenseTies
from linlora.fusion.registry import FROM_VECTORS, METHODS, fuse, needs
from linlora.layers.vanilla import refuse_changed_base
from linlora.merging.plan import Plan
from linlora.merging.shards import Queue, save_shard, write_shard
from linlora.storage.ahead import one_thread
from linlora.storage.staging import refuse_existing, unfinished_folder
from linlora.vectors.base_models import model_name


@dataclass(frozen=True)
class Merged:
    """The result of `merge_files`.

    `left_out` names files of the base that are not in the merged folder; `notes` say which adapters name another base.
    """

    folder: Path
    folded: int
    replaced: int
    tensors: int
    nbytes: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def merge_files(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    progress: Callable[[Sequence[str]], Iterator[str]] = iter,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Merged:
    """Write a base model with adapters merged into it, as a folder that transformers loads.

    Args:
        base: folder of a model, safetensors in one file or in shards, as transformers writes them.
        adapters: files or folders of any format of `linlora.formats`; their ΔW are summed. A head trained beside an
            adapter replaces the base's, or is added: the merged model is then of the class, and has the class names,
            that the adapter's `model_config` gives.
        out: the folder to write; it is new or empty.
        progress: iterates over the names of the shards.
        weights: factors of the ΔW, 1 if left out.
        method, options: of `linlora.fuse`, which fuses the adapters in weight space, layer by layer, instead of
            summing them.

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
    refuse_existing(folder)
    checkpoint = Checkpoint(Path(base))
    stored = [formats.open(path) for path in adapters]
    for adapter in stored:
        refuse_changed_base(adapter.vector.changed_base, str(adapter.path))
    changes, dense = stored, None
    if weights is not None or method is not None:
        changes, dense = _fused(stored, weights, method, options or {})
    plan = Plan(checkpoint, stored, changes, dense)
    beside, left_out = beside_the_weights(checkpoint.folder, {*checkpoint.files, INDEX_FILE})
    beside += [Path(INDEX_FILE)] if checkpoint.index is not None else []
    with unfinished_folder(out) as staging:
        for path in beside:
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / path, staging / path)
        plan.describe(staging)
        # a block keeps one thread busy for a millisecond, and the other core is the writing thread's
        with one_thread(), Queue() as flushing, Queue(3) as writing:
            for name in progress(list(checkpoint.files)):
                file = checkpoint.files[name]
                if plan.additions(file):
                    save_shard(file, plan, staging / name)
                else:
                    write_shard(file, plan, staging / name, writing, flushing)
        os.replace(staging, out)
    nbytes = sum(e.stop - e.start for file in checkpoint.files.values() for e in file.entries.values())
    return Merged(
        folder,
        len(plan.changes),
        len(plan.replacements),
        len(plan.added.keys() | checkpoint.home.keys()),
        nbytes,
        tuple(map(str, left_out)),
        tuple(_notes(checkpoint, stored)),
    )


def _notes(checkpoint: Checkpoint, adapters: Sequence[formats.Stored]) -> Iterator[str]:
    """A note of every adapter that names another base model, by its name and by that of the base's configuration."""
    folder = checkpoint.folder
    own = [str(folder), str(folder.resolve()), str(checkpoint.config.get("_name_or_path") or folder)]
    names = set(map(model_name, own))
    for adapter in adapters:
        named = adapter.vector.base_model
        if named and names.isdisjoint(map(model_name, [named, str(Path(named).resolve())])):
            yield (
                f"{adapter.path} was trained on '{named}' and is merged into '{folder}': right only if both are the "
                "same weights"
            )


def _fused(
    adapters: Sequence[formats.Stored], weights: Sequence[float] | None, method: str | None, options: Mapping[str, Any]
) -> tuple[list[formats.Stored], DenseTies | None]:
    """The adapters as one, whose layers are computed when they are asked for; for TIES all of them, and the rule."""
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
