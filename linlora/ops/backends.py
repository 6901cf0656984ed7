"""Which code runs an op: `torch` (composed aten calls, everywhere), `triton` (one launch an op) or `cuda` (csrc/).

Left alone, linlora runs the fastest backend that is *proven* for the call at hand: a kernel is chosen by itself only
where `bench/results/` holds a run on that architecture, in that class of shapes, dtype and dropout or none, whose
correctness checks are green and whose time beats composed torch (`linlora.ops.evidence`). Anything else has to be asked
for by name, and a name that cannot be honoured is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

import linlora.kernels as kernels
from linlora.kernels.problem import LoraLinear
from linlora.ops import aten, choice, cuda, evidence
from linlora.ops.evidence import Entry, ShapeClass, shape_class

BackendName = Literal["torch", "triton", "cuda"]
OPS = (
    "linearized_lora_linear", "lora_linear", "routed_lora_linear", "factor_gradients",
    "linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation",
)  # fmt: skip
LAYER_OPS = ("linearized_lora_linear", "lora_linear")
"""The ops whose backend depends on the call: its class of shapes, its dtype, its rank, dropout or none."""

_MODULES: dict[str, ModuleType] = {"torch": aten, "triton": kernels, "cuda": cuda}


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Run every linlora op inside the block on one backend; "cuda" has the ops it has no kernel of from "triton".

    Raises ValueError for a name that does not exist and BackendUnavailableError where the backend cannot run at all.
    A call that the backend does not serve (dropout or float32 on "cuda") raises BackendUnavailableError too.
    The choice is that of the thread, or asyncio task, that is in the block; one started inside of it as a task has it
    too, a new thread has none. The backward of an op runs on the backend of its forward, whichever thread runs it.

    >>> import linlora
    >>> with linlora.use_backend("torch"):
    ...     print(linlora.explain(device="cpu").backend)
    torch
    """
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}: choose 'torch', 'triton' or 'cuda'")
    reason = unavailable(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    with choice.made(name):
        yield


def select(
    device: torch.device,
    op: str,
    shape: ShapeClass = "any",
    dtype: torch.dtype | None = None,
    rank: int = 0,
    dropout: bool = False,
) -> ModuleType:
    """The module whose `op` runs for tensors on `device`: the one asked for, else the proven one."""
    name = choice.name()
    if name is None:
        return _MODULES[automatic(device.type, device.index, op, shape, dtype, rank, dropout)]
    if not torch.compiler.is_compiling():
        obstacles = choice.obstacles()
        if device not in obstacles:
            obstacles[device] = unavailable(name, device)
        reason = obstacles[device] or refusal(name, op, dtype, rank, dropout)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run {op} on {device}: {reason}")
    return _MODULES[name]


def select_layer(problem: LoraLinear) -> ModuleType:
    """The module whose `lora_linear` runs for a problem, whose x is (..., K)."""
    x = problem.x
    if choice.name() is None and x.device.type != "cuda":
        return aten
    n, k = problem.weight.shape
    shape = shape_class(x.numel() // max(k, 1), n)
    return select(x.device, problem.op, shape, x.dtype, problem.rank, problem.dropout_p > 0.0)


@torch.compiler.assume_constant_result
def automatic(
    device_type: str,
    device_index: int | None,
    op: str,
    shape: ShapeClass = "any",
    dtype: torch.dtype | None = None,
    rank: int = 0,
    dropout: bool = False,
) -> str:
    """The backend that runs when none was asked for: the fastest of those proven for such a call, else 'torch'."""
    return "torch" if device_type != "cuda" else _fastest(device_type, device_index, op, shape, dtype, rank, dropout)


@functools.cache
def _fastest(
    device_type: str,
    device_index: int | None,
    op: str,
    shape: ShapeClass,
    dtype: torch.dtype | None,
    rank: int,
    dropout: bool,
) -> str:
    device = torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
    for entry in evidence.known(op, architecture(device_type, device_index), shape, dtype, dropout):
        if entry.proves and rank <= entry.max_rank and unavailable(entry.backend, device) is None:
            return entry.backend
    return "torch"


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, with the remedy; None when it can."""
    if name == "cuda":
        return cuda.availability(device)
    return kernels.availability(device) if name == "triton" else None


def refusal(name: str, op: str, dtype: torch.dtype | None, rank: int, dropout: bool) -> str | None:
    """Why a backend that is there does not serve a call, with the remedy; None when it does."""
    return cuda.refusal(dtype, rank, dropout) if name == "cuda" and op in cuda.OPS else None


@functools.cache
def architecture(device_type: str, device_index: int | None = None) -> str:
    """The name evidence is filed under: 'sm_90' for an H100 or H200, 'cpu' for a CPU."""
    if device_type != "cuda":
        return device_type
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class Explanation:
    """Which backend an op runs on and why not the others; `str()` of it is the readable form."""

    op: str
    device: str
    backend: str
    reasons: dict[str, str]
    call: str = ""

    def __str__(self) -> str:
        call = f" ({self.call})" if self.call else ""
        lines = [f"{self.op} on {self.device}{call} runs on {self.backend!r}"]
        return "\n".join(lines + [f"  {name:6s}  {reason}" for name, reason in self.reasons.items()])


def explain(
    op: str = "linearized_lora_linear",
    device: torch.device | str = "cpu",
    *,
    shape: tuple[int, int, int] | None = None,
    rank: int = 16,
    dtype: torch.dtype | None = None,
    dropout: bool = False,
) -> Explanation:
    """Say which backend would run `op` for tensors on `device` now, and why not the others.

    Args:
        shape: (M, K, N) of the call of a LoRA layer: rows, inputs, outputs. Without one, the answer is that for the
            large shapes that training is made of.
        rank, dropout: of that call. dtype: of its x; without one, what is proven for any.

    Raises ValueError for an op that does not exist.

    >>> import linlora
    >>> print(linlora.explain("linearized_lora_linear", "cpu").backend)
    torch
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(OPS)}")
    device = torch.device(device)
    layer = op in LAYER_OPS
    shapes: ShapeClass = "any" if not layer else "large" if shape is None else shape_class(shape[0], shape[2])
    question = _Question(op, device, shapes, dtype, rank if layer else 0, dropout and layer)
    return Explanation(op, str(device), question.answer(), question.reasons(), question.call if shape else "")


@dataclass(frozen=True)
class _Question:
    """An op on a device, and the kind of call."""

    op: str
    device: torch.device
    shape: ShapeClass
    dtype: torch.dtype | None
    rank: int
    dropout: bool

    @property
    def call(self) -> str:
        dtype = "" if self.dtype is None else " in " + str(self.dtype).removeprefix("torch.")
        shapes = "" if self.shape == "any" else f"{self.shape} shapes"
        return f"{shapes}{dtype}{' with dropout' if self.dropout else ''}".strip()

    def answer(self) -> str:
        """The backend whose code runs."""
        name = choice.name() or self._automatic()
        return "triton" if name == "cuda" and self.op not in cuda.OPS else name

    def reasons(self) -> dict[str, str]:
        return {name: self._reason(name) for name in ("cuda", "triton", "torch")}

    def _automatic(self) -> str:
        # The gradients of the factors are computed in the backward of a layer, on the backend of the layer.
        op, shape = (self.op, self.shape) if self.op != "factor_gradients" else ("linearized_lora_linear", "large")
        return automatic(
            self.device.type, self.device.index, op, shape, self.dtype, self.rank, self.dropout
        )  # fmt: skip

    def _reason(self, name: str) -> str:
        if name == "cuda" and self.op not in cuda.OPS:
            return "no kernel of this op: under use_backend('cuda') it runs on 'triton'"
        refused = refusal(name, self.op, self.dtype, self.rank, self.dropout)
        requested = choice.name()
        if name == self.answer():
            if requested is None:
                return "chosen automatically" + (f": {entry}" if (entry := self._entry(name)) else "")
            how = "asked for with use_backend" if requested == name else f"asked for with use_backend({requested!r})"
            return how if refused is None else f"{how}, where such a call is an error: {refused}"
        refused = unavailable(name, self.device) or refused
        if refused is not None:
            return f"not available: {refused}"
        if requested is not None:
            return "available"
        if name == "torch":
            return "available; the chosen backend is faster by the runs in bench/results/"
        return f"available on request; {self._doubt(name)}"

    def _doubt(self, name: str) -> str:
        """Why a backend that could run is not chosen."""
        ran, entry = evidence.executed_on(self.op, name), self._entry(name)
        if not ran:
            return "not yet run on a GPU"
        if entry is None:
            arch = architecture(self.device.type, self.device.index)
            return f"run on {', '.join(ran)}, but no run in bench/results/ is on {arch} and of {self.call or 'this op'}"
        if entry.proves and self.rank > entry.max_rank:
            return f"proven up to rank {entry.max_rank} only: {entry}"
        return f"slower than the chosen one: {entry}" if entry.proves else f"slower than torch, or wrong: {entry}"

    def _entry(self, name: str) -> Entry | None:
        arch = architecture(self.device.type, self.device.index)
        found = evidence.known(self.op, arch, self.shape, self.dtype, self.dropout)
        return next((entry for entry in found if entry.backend == name), None)
