"""Which code runs an op: `torch` (composed aten calls, everywhere), `triton` (one launch an op) or `cuda` (csrc/).

Left alone, linlora runs the fastest backend that is *proven* for the call at hand: a kernel is chosen by itself only
where `linlora tune` on this machine, or a run in the package, checked it on such a call and found it faster than
composed torch (`linlora.ops.evidence`). Anything else has to be asked for by name, and a name that cannot be honoured
is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

import linlora.kernels as kernels
from linlora.kernels.neighbours import CHANGES
from linlora.kernels.problem import LoraLinear
from linlora.ops import aten, choice, cuda, evidence, first_use
from linlora.ops.evidence import LARGE, Call, Size, power_of_two
from linlora.ops.neighbours import Neighbour, backend_of
from linlora.ops.verification import verified

BackendName = Literal["torch", "triton", "cuda"]
OPS = (
    "linearized_lora_linear", "lora_linear", "routed_lora_linear", "factor_gradients",
    "linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation",
)  # fmt: skip
LAYER_OPS = ("linearized_lora_linear", "lora_linear")
"""The ops with a rank and dropout."""

DECIDED = {"cuda"}
"""The types of devices on which evidence decides; on the others composed torch runs."""

_MODULES: dict[str, Any] = {
    "torch": aten, "triton": verified("triton", kernels), "cuda": verified("cuda", cuda),
} | {name: verified(name, Neighbour(change)) for change in CHANGES for name in [f"triton {change}"]}  # fmt: skip
_decided: dict[tuple, str] = {}
"""The backend of every call that was met, by the arguments of `automatic`."""


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
    size: Size = LARGE,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    dropout: bool = False,
) -> ModuleType:
    """The module whose `op` runs for tensors on `device`: the one asked for, else the proven one."""
    name = choice.name()
    if name is None:
        if device.type not in DECIDED:
            return aten
        rows, inputs, outputs = size
        size = power_of_two(rows), power_of_two(inputs), power_of_two(outputs)
        return _MODULES[automatic(device.index, op, size, dtype, power_of_two(rank), dropout)]
    if not torch.compiler.is_compiling():
        obstacles = choice.obstacles()
        if device not in obstacles:
            obstacles[device] = unavailable(name, device)
        reason = obstacles[device] or refusal(name, op, dtype, rank, dropout)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run {op} on {device}: {reason}")
    return _MODULES[name]


def select_layer(problem: LoraLinear) -> ModuleType:
    """The module whose `lora_linear` runs for a problem, whose x is (..., K); `torch` where nothing is to launch."""
    x = problem.x
    if choice.name() is None and x.is_cpu and "cpu" not in DECIDED:
        return aten
    n, k = problem.weight.shape
    if x.numel() == 0 or n == 0 or problem.rank == 0:
        return aten
    size = x.numel() // k, k, n
    return select(x.device, problem.op, size, x.dtype, problem.rank, problem.dropout_p > 0.0)


def select_op(op: str, x: Tensor, *parameters: Tensor) -> ModuleType:
    """The module whose `op` runs for x (..., K) and parameters, of which the first is (N, K), without one N being K;
    `torch` where one of them is empty, for there is nothing to launch."""
    if x.numel() == 0 or any(parameter.numel() == 0 for parameter in parameters):
        return aten
    features = x.shape[-1] if x.dim() else 1
    outputs = parameters[0].shape[0] if parameters else features
    return select(x.device, op, (x.numel() // features, features, outputs), x.dtype)


@torch.compiler.assume_constant_result
def automatic(
    index: int | None, op: str, size: Size, dtype: torch.dtype | None = None, rank: int = 0, dropout: bool = False
) -> str:
    """The backend that runs on a GPU when none was asked for: the fastest of those proven for such a call, or torch.
    `size` and `rank` are powers of two."""
    asked = index, op, size, dtype, rank, dropout
    name = _decided.get(asked)
    if name is None:
        name = _decided[asked] = _decide(index, call_of(*asked[1:]))
    return name


def call_of(op: str, size: Size, dtype: torch.dtype | None = None, rank: int = 0, dropout: bool = False) -> Call:
    """The call as evidence is filed."""
    return Call(op, size, None if dtype is None else str(dtype).removeprefix("torch."), rank, dropout)


def calls_met() -> list[Call]:
    """The calls that evidence was asked about since `decide_again`, in powers of two."""
    return list(dict.fromkeys(call_of(*asked[1:]) for asked in list(_decided)))


def decide_again() -> None:
    """Forget the choices that were made before, as new evidence asks for."""
    _decided.clear()


def _decide(index: int | None, call: Call) -> str:
    entry = evidence.decisive(call, index) or first_use.meet(call, index)
    device = torch.device("cuda" if index is None else f"cuda:{index}")
    proven = entry.ranking if entry is not None else ()
    return next((name for name in proven if unavailable(name, device) is None), "torch")


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, with the remedy; None when it can."""
    if name == "cuda":
        return cuda.availability(device)
    return kernels.availability(device) if backend_of(name) == "triton" else None


def refusal(name: str, op: str, dtype: torch.dtype | None, rank: int, dropout: bool) -> str | None:
    """Why a backend that is there does not serve a call, with the remedy; None when it does."""
    return cuda.refusal(dtype, rank, dropout) if name == "cuda" and op in cuda.OPS else None
