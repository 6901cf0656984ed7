"""What the ops of routing ask of their arguments, stated once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from linlora.kernels.problem import LoraLinear
from linlora.ops.checks import autocast_enabled
from linlora.ops.transforms import transform_active

if TYPE_CHECKING:
    from linlora.ops.grouping import Groups

_OP = "routed_lora_linear"


def check_inventory(A: Tensor | None, B: Tensor, features: tuple[int, int], op: str = _OP) -> None:
    """Raise a ValueError unless A (Q, S, K/Q, r) and B (Q, S, r, N/Q) fit a layer of `features` (K, N)."""
    k, n = features
    if B.dim() != 4 or (A is not None and A.dim() != 4):
        _refuse(f"an inventory A (Q, S, K/Q, r), B (Q, S, r, N/Q) is expected, got {_shapes(A=A, B=B)}", op)
    heads, skills, rank, _ = B.shape
    if heads == 0 or skills == 0 or rank == 0:
        _refuse(f"an inventory has at least one head, one skill and rank 1, got {_shapes(A=A, B=B)}", op)
    if n % heads or k % heads:
        _refuse(f"Q = {heads} heads do not divide a layer of {k} inputs and {n} outputs; choose a divisor of both", op)
    if A is not None and (A.shape[:2] != B.shape[:2] or A.shape[3] != rank):
        _refuse(f"A (Q, S, K/Q, r) and B (Q, S, r, N/Q) differ in heads, skills or rank: {_shapes(A=A, B=B)}", op)
    if B.shape[3] * heads != n or (A is not None and A.shape[2] * heads != k):
        wanted = f"A ({heads}, {skills}, {k // heads}, {rank}) and B ({heads}, {skills}, {rank}, {n // heads})"
        _refuse(f"{wanted} are expected for {k} inputs and {n} outputs, got {_shapes(A=A, B=B)}", op)


def check_inventories(As: list[Tensor | None], Bs: list[Tensor], mixtures: list[Tensor]) -> None:
    """Raise a ValueError unless the layers' inventories and weights fit, each other and in number."""
    op = "mix_inventories"
    if not len(As) == len(Bs) == len(mixtures):
        _refuse(f"lists of one length are expected, got {len(As)} As, {len(Bs)} Bs and {len(mixtures)} mixtures", op)
    for i, (A, B, mixture) in enumerate(zip(As, Bs, mixtures, strict=True)):
        where = f"{op}: layer {i}"
        if B.dim() == 4:
            heads = B.shape[0]
            inputs = 0 if A is None or A.dim() != 4 else A.shape[2] * heads
            check_inventory(A, B, (inputs, B.shape[3] * heads), where)
        else:
            check_inventory(A, B, (0, 0), where)
        if mixture.dim() != 3 or mixture.shape[1:] != B.shape[:2]:
            heads, skills = B.shape[:2]
            _refuse(f"a mixture (T, Q = {heads}, S = {skills}) is expected, got {_shapes(mixture=mixture)}", where)
        if A is not None and A.dtype != B.dtype:
            _refuse(f"A is {A.dtype}, B {B.dtype}: the skills of a layer have one dtype", where)
        for name, tensor in (("A", A), ("mixture", mixture)):
            if tensor is not None and tensor.device != B.device:
                _refuse(f"{name} is on {tensor.device}, B on {B.device}: move the model or the weights", where)


def check_routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    task_ids: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument, what it is and what it has to be; task ids' values come after."""
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        _refuse(f"x (..., K) and weight (N, K) are expected, got {_shapes(x=x, weight=weight)}")
    n, k = weight.shape
    check_inventory(A, B, (k, n))
    rank = B.shape[2]
    _check_frozen(_OP, x, weight, bias, A, B, rank, A0, B0, None, dropout_p, seed)
    _check_placed(_OP, "mixture", mixture, x)
    _check_mixture(x, mixture, task_ids, (B.shape[0], B.shape[1]))


def _check_mixture(x: Tensor, mixture: Tensor, task_ids: Tensor | None, heads_skills: tuple[int, int]) -> None:
    leading = tuple(x.shape[:-1])
    if mixture.dim() < 2 or tuple(mixture.shape[-2:]) != heads_skills:
        heads, skills = heads_skills
        _refuse(f"mixture (..., Q = {heads}, S = {skills}) is expected, got {_shapes(mixture=mixture)}")
    if task_ids is None:
        prefix = tuple(mixture.shape[:-2])
        if prefix != leading[: len(prefix)]:
            _refuse(
                f"without task_ids the mixture holds weights for leading dimensions of x {leading}, got "
                f"{_shapes(mixture=mixture)}; if it is a table with a row a task, task_ids are missing"
            )
        return
    if mixture.dim() != 3:
        _refuse(f"with task_ids the mixture is a table (T, Q, S), got {_shapes(mixture=mixture)}")
    _check_integers(task_ids, _OP)
    if task_ids.device != x.device:
        _refuse(f"task_ids are on {task_ids.device}, x on {x.device}: move the input")
    if tuple(task_ids.shape) != leading[: task_ids.dim()]:
        _refuse(f"task_ids for leading dimensions of x {leading} are expected, got {_shapes(task_ids=task_ids)}")


def check_grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    groups: Groups,
    A0: Tensor | None,
    B0: Tensor | None,
    x_tangent: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument, what it is and what it has to be."""
    op = "grouped_lora_linear"
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        _refuse(f"x (..., K) and weight (N, K) are expected, got {_shapes(x=x, weight=weight)}", op)
    n, k = weight.shape
    if B.dim() != 3 or (A is not None and A.dim() != 3):
        _refuse(f"mixed factors A (T, K, r) and B (T, r, N) are expected, got {_shapes(A=A, B=B)}", op)
    rank, n_groups = B.shape[1], groups.n_groups
    if tuple(B.shape) != (n_groups, rank, n) or (A is not None and tuple(A.shape) != (n_groups, k, rank)):
        wanted = f"A ({n_groups}, {k}, {rank}) and B ({n_groups}, {rank}, {n})"
        _refuse(f"{wanted} are expected for {n_groups} groups, got {_shapes(A=A, B=B)}", op)
    if x.shape[:-1].numel() != groups.rows:
        _refuse(f"the groups are of {groups.rows} rows, x has {x.shape[:-1].numel()}: {_shapes(x=x)}", op)
    if groups.ids.device != x.device:
        _refuse(f"the groups' ids are on {groups.ids.device}, x on {x.device}: move the task ids", op)
    _check_frozen(op, x, weight, bias, A, B, rank, A0, B0, x_tangent, dropout_p, seed)


def _check_frozen(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    rank: int,
    A0: Tensor | None,
    B0: Tensor | None,
    x_tangent: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """What holds of the frozen layer, its point and the dtypes, however the factors of a row come about."""
    n, k = weight.shape
    if A0 is None and B0 is not None:
        _refuse("B0 without A0: a linearization point is A0 and B0, or A0 alone where B0 = 0", op)
    if A is None and (A0 is None or B0 is not None):
        _refuse("A is missing: only a layer linearized at A0 and B0 = 0 does without", op)
    # The frozen layer and the point are those of `lora_linear`, with stand-ins for its offsets.
    dA, dB = x.new_empty(()).expand(rank, k), x.new_empty(()).expand(n, rank)
    point = dA if A0 is None else A0
    LoraLinear(
        x, weight, bias, point, B0, None if B0 is None else dA, dB, 1.0, x_tangent, dropout_p, seed
    ).check(op, autocast_enabled(x.device.type))  # fmt: skip
    for name, tensor in (("A", A), ("B", B)):
        if tensor is not None:
            _check_placed(op, name, tensor, x)


def _check_placed(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in (x.dtype, torch.float32) and not autocast_enabled(x.device.type):
        _refuse(f"{name} is {tensor.dtype}: it is float32 or of x's dtype ({x.dtype})", op)
    if tensor.device != x.device:
        _refuse(f"{name} is on {tensor.device}, x on {x.device}: move the model or the input", op)


def check_ids(ids: Tensor, n_groups: int, rows: int) -> None:
    """Raise a ValueError unless ids (E,) are integers, E divides the rows, and all are below n_groups."""
    _check_integers(ids, "Groups")
    examples = ids.shape[0]
    if rows % examples if examples else rows:
        _refuse(f"{rows} rows are not a whole number for each of {examples} task ids", "Groups")
    check_task_ids(ids, n_groups, "Groups")


def check_task_ids(task_ids: Tensor, tasks: int, op: str = _OP) -> None:
    """Raise unless every id is in 0 ... tasks − 1: a ValueError on a CPU. Elsewhere reading the ids would wait for the
    device, so an assertion is queued there instead, which stops the process's work on it when it fails."""
    if transform_active() or task_ids.device.type == "meta":
        return
    if task_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in task_ids.aminmax()) if task_ids.numel() else (0, -1)
        if low < 0 or high >= tasks:
            _refuse(f"task id {low if low < 0 else high} is unknown: the ids of {tasks} tasks are 0 to {tasks - 1}", op)
        return
    known = ((task_ids >= 0) & (task_ids < tasks)).all()
    torch._assert_async(known, f"{op}: a task id is unknown: the ids of {tasks} tasks are 0 to {tasks - 1}")


def _check_integers(task_ids: Tensor, op: str) -> None:
    if task_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        _refuse(f"task_ids are integers, got {task_ids.dtype}", op)


def _refuse(message: str, op: str = _OP) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def _shapes(**tensors: Tensor | None) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)
