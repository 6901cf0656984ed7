"""Writes the shards of a merged model in the order of their bytes.

A second thread writes blocks of rows, a third flushes them to the disk; the kernel copies what lies between
two changed tensors.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from linlora.merging.plan import Plan
from linlora.storage.files import install_file
from linlora.storage.tensor_files import TensorFile, save_tensors, write
from linlora.storage.tensors import StoredTensors, memory

_FLUSH = 2**27
"""Bytes after which written ones are flushed to the disk, beside the work; flushed at the end, all are waited for."""


def write_shard(file: TensorFile, plan: Plan, path: Path, writing: Queue, flushing: Queue) -> None:
    """Write a shard with some tensors changed: the same header, the same places."""
    out = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by the flushing thread)
    done = 0
    for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start):
        if name in plan.changed:
            writing.put(file.copy, done, entry.start, out.fileno())
            for block in plan.merged(file, name):
                writing.put(write, out, memory(block))
            if entry.stop // _FLUSH > done // _FLUSH:
                writing.put(flushing.put, os.fsync, out.fileno())
            done = entry.stop
    writing.put(file.copy, done, file.size, out.fileno())
    writing.put(flushing.put, out.close)
    writing.put(flushing.put, install_file, path, path)


def save_shard(file: TensorFile, plan: Plan, path: Path) -> None:
    """Write a shard that gets tensors it has no place for: all of it anew, one tensor at a time."""
    like = file.tensors().like | plan.additions(file)
    tensors = StoredTensors(
        like, lambda name: torch.cat(list(plan.merged(file, name))) if name in plan.changed else file.read(name)
    )
    save_tensors(path, tensors, {"format": "pt", **file.metadata})


class Queue:
    """Jobs for another thread, in their order, at most `limit` waiting. `put` or the end raises a job's error."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit

    def __enter__(self) -> Queue:
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
