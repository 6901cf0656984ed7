"""The training loop of the packaged experiments: AdamW, the learning rates falling to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def descend(
    parameters: Iterable[Any], steps: int, batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor], **options: Any
) -> Iterator[Tensor]:
    """Train on some batches; yields the loss of each, after its step.

    Args:
        parameters: tensors or groups, and `options`, as `torch.optim.AdamW` takes them.
        steps: in which the rates fall to zero.
    """
    optimizer = torch.optim.AdamW(parameters, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def batches(rows: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` full batches, reshuffled each time the rows are used up."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, rows)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(rows, generator=generator)
        yield queue[:batch]
        queue = queue[batch:]
