"""LINLORA_VERIFY=N: every N-th call of a kernel is compared with the composed op, and a difference raises.

All ops but those of routing, whose rows each backend lays out its own way; eager calls, outside of CUDA graphs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linlora.ops import aten

_OF_ROUTING = (
    "grouped_lora_linear", "grouped_shrink", "grouped_gradients", "group_rows", "place", "mix_inventories",
    "unmix_inventories",
)  # fmt: skip
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}  # of two roundings, or of tf32


class KernelMismatchError(RuntimeError):
    """A kernel's result is not that of the composed op; the message names both and says what to do."""


def verified(name: str, backend: Any) -> Any:
    """The backend, compared with `torch` on every LINLORA_VERIFY-th call of an op; as it is without the variable."""
    every = os.environ.get("LINLORA_VERIFY", "0")
    if not every.isdigit():
        raise ValueError(f"LINLORA_VERIFY={every!r}: a number of calls is expected, 1 for every call, 0 for none")
    return Verified(name, backend, int(every)) if int(every) else backend


class Verified:
    """A backend whose every N-th call of an op is compared."""

    def __init__(self, name: str, backend: Any, every: int) -> None:
        self._name, self._backend, self._every = name, backend, every

    def __getattr__(self, op: str) -> Any:
        kernel = getattr(self._backend, op)
        if hasattr(aten, op) and op not in _OF_ROUTING:
            kernel = self._compared(op, kernel)
        setattr(self, op, kernel)
        return kernel

    def _compared(self, op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        count = itertools.count(1)

        def call(*arguments: Any, **options: Any) -> Any:
            result = kernel(*arguments, **options)
            if not _traced() and next(count) % self._every == 0:
                with torch.no_grad():
                    self._compare(op, result, _composed(op, *arguments, **options))
            return result

        return call

    def _compare(self, op: str, result: Any, expected: Any) -> None:
        results, names = _outputs(result), getattr(result, "_fields", ("output", "second output", "third output"))
        for name, found, other in zip(names, results, _outputs(expected), strict=False):
            if found is None or other is None or found.numel() == 0:
                continue
            error = _error(found, other)
            if not error <= _TOLERANCE.get(other.dtype, 1e-3):
                what = f"{name} {tuple(found.shape)} {found.dtype}"
                raise KernelMismatchError(
                    f"{op} on {self._name!r}: {what} is {error:.1e} from that of composed torch, relative to it. "
                    "Run under linlora.use_backend('torch'), measure again with `linlora tune --fresh`, and "
                    "report the shape and what `linlora info` prints"
                )


def _traced() -> bool:
    """Whether the host may not look at results now."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


def _composed(op: str, *arguments: Any, **options: Any) -> Any:
    if op == "attention_backward":  # of what the composed forward keeps: a kernel keeps its own
        problem, g, _ = arguments
        return aten.attention_backward(problem, g, aten.attention(problem))
    return getattr(aten, op)(*arguments, **options)


def _outputs(result: Any) -> tuple[Tensor | None, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(found: Tensor, other: Tensor) -> float:
    """‖found − other‖ / ‖other‖, without what is not finite in both: a training that diverged is not the kernel's.
    Statistics of a row are of one shape or another."""
    found = found.reshape(other.shape)
    both = ~found.isfinite() & ~other.isfinite()
    a, b = (torch.where(both, 0.0, x.double()) for x in (found, other))
    difference, norm = (a - b).norm().item(), b.norm().item()
    return difference / norm if norm else difference
