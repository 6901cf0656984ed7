"""Adapters merged into a base model from file to file: the model is never built, a block of rows is in memory.

The shards of the base are gone through in the order of their bytes. Of an adapted weight a block of rows is read,
W + Σ ΔW is summed in float32 and rounded once (linlora.weights), and handed to a second thread, which writes it; a
third flushes it to the disk. Everything between two weights is copied by the kernel. The folder appears under its
name when it is whole.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora import formats
from linlora.files import install_file
from linlora.folding import factors_of
from linlora.formats.checkpoint import Checkpoint, WrongBaseError
from linlora.tensor_files import TensorFile, finite, memory, shapes, write
from linlora.weights import Update, blocks, folded

_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".ot")
_FLUSH = 2**27
"""Bytes after which what is written goes to the disk, beside the work; all of it at the end would be waited for."""


@dataclass(frozen=True)
class Merged:
    """What `merge_files` did."""

    folder: Path
    folded: int
    replaced: int
    tensors: int
    nbytes: int


def merge_files(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    progress: Callable[[Sequence[str]], Iterator[str]] = iter,
) -> Merged:
    """Write the model that a base and adapters make together, as a folder that transformers loads.

    Args:
        base: folder of a model, safetensors in one file or in shards, as transformers writes them.
        adapters: files or folders of any format of `linlora.formats`; their ΔW are summed. What was trained beside an
            adapter (a head) replaces the base's.
        out: the folder to write; it must not exist, or be empty.
        progress: goes through the names of the shards.

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
    plan = _Plan(checkpoint, [formats.open(path) for path in adapters])
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _copy_beside(checkpoint, staging)
        with _one_thread(), _Queue() as flushing, _Queue(3) as writing:
            for name in progress(list(checkpoint.files)):
                _write_shard(checkpoint.files[name], plan, staging / name, writing, flushing)
        os.chmod(staging, 0o755)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    nbytes = sum(e.stop - e.start for file in checkpoint.files.values() for e in file.entries.values())
    return Merged(folder, len(plan.folds), len(plan.replacements), len(checkpoint.home), nbytes)


class _Plan:
    """What becomes of each tensor of the base."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[formats.Stored]) -> None:
        self.folds: dict[str, list[tuple[Path, Callable[[], Update]]]] = defaultdict(list)
        self.replacements: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
        for adapter in adapters:
            placed = checkpoint.place(adapter.layer_sizes())
            for layer, (key, transposed) in placed.items():
                self.folds[key].append((adapter.path, _reader(adapter, layer, transposed)))
            self._replace(checkpoint, adapter)
        for key in self.folds.keys() & self.replacements.keys():
            own = self.replacements[key][0]  # with a LoRA of an output embedding PEFT saves the weight it is added to
            if other := next((path for path, _ in self.folds[key] if path != own), None):
                raise ValueError(
                    f"'{key}' was trained as a whole beside {own}, and {other} changes it; merge one of the adapters, "
                    "or train both alike"
                )

    def _replace(self, checkpoint: Checkpoint, adapter: formats.Stored) -> None:
        keys = checkpoint.keys([f"{layer}.weight" for layer in adapter.vector.scalings] + list(adapter.extras))
        for name, like in shapes(adapter.extras).items():
            key = keys[name]
            there = checkpoint.entry(key).shape if key in checkpoint.home else None
            if there != tuple(like.shape):
                raise WrongBaseError(
                    f"'{name}' {tuple(like.shape)} was trained beside the adapter {adapter.path}, and "
                    f"{checkpoint.folder} has {'no such tensor' if there is None else f'one of {there}'} to replace (a "
                    "head of its own?): build the model with this head, load the adapter with PEFT and call "
                    "linlora.merge(model).save_pretrained(folder)"
                )
            if key in self.replacements:
                raise ValueError(
                    f"'{name}' was trained beside {self.replacements[key][0]} and beside {adapter.path}, and a model "
                    "has one; merge one of the adapters, or remove the head from one"
                )
            self.replacements[key] = (adapter.path, functools.partial(adapter.extras.__getitem__, name))

    def merged(self, file: TensorFile, key: str) -> Iterator[Tensor]:
        """The tensor of a key in the merged model, in blocks of rows."""
        like = file.like(key)
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
        A, B = torch.cat([update.A for update in updates]), torch.cat([update.B for update in updates], dim=1)
        wide = torch.promote_types(A.dtype, like.dtype)
        update = Update(A.to(wide), B.to(wide), updates[0].transposed)
        may_overflow = like.dtype == torch.float16 or float(update.A.norm() * update.B.norm()) > 1e30
        for rows in blocks(like.shape):
            block = folded(read_rows(rows), update, rows)
            if may_overflow and not finite(block):
                raise ValueError(f"'{key}': W + ΔW is not finite in {like.dtype}; a smaller scaling is needed")
            yield block


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of PyTorch's: a block keeps it busy for a millisecond, and the other core is the writing thread's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _copy_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Configuration, tokenizer and all else that is neither weights nor hidden."""
    for source in sorted(checkpoint.folder.rglob("*")):
        relative = source.relative_to(checkpoint.folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if source.is_file() and not hidden and source.suffix not in _WEIGHTS and ".bin.index" not in source.name:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / relative)
