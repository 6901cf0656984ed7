"""What the ops of routing ask of their arguments, stated once."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.kernels.problem import check_factors, check_layer, shapes
from linlora.ops.transforms import transform_active

_OP = "routed_lora_linear"


def check_inventory(A: Tensor | None, B: Tensor, features: tuple[int, int], op: str = _OP) -> None:
    """Raise a ValueError unless A (Q, S, K/Q, r) and B (Q, S, r, N/Q) fit a layer of `features` (K, N)."""
    k, n = features
    if B.dim() != 4 or (A is not None and A.dim() != 4):
        _refuse(f"an inventory A (Q, S, K/Q, r), B (Q, S, r, N/Q) is expected, got {shapes(A=A, B=B)}", op)
    heads, skills, rank, _ = B.shape
    if heads == 0 or skills == 0 or rank == 0:
        _refuse(f"an inventory has at least one head, one skill and rank 1, got {shapes(A=A, B=B)}", op)
    if n % heads or k % heads:
        _refuse(f"Q = {heads} heads do not divide a layer of {k} inputs and {n} outputs; choose a divisor of both", op)
    if A is not None and (A.shape[:2] != B.shape[:2] or A.shape[3] != rank):
        _refuse(f"A (Q, S, K/Q, r) and B (Q, S, r, N/Q) differ in heads, skills or rank: {shapes(A=A, B=B)}", op)
    if B.shape[3] * heads != n or (A is not None and A.shape[2] * heads != k):
        wanted = f"A ({heads}, {skills}, {k // heads}, {rank}) and B ({heads}, {skills}, {rank}, {n // heads})"
        _refuse(f"{wanted} are expected for {k} inputs and {n} outputs, got {shapes(A=A, B=B)}", op)


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
            _refuse(f"a mixture (T, Q = {heads}, S = {skills}) is expected, got {shapes(mixture=mixture)}", where)
        if A is not None and A.dtype != B.dtype:
            _refuse(f"A is {A.dtype}, B {B.dtype}: the skills of a layer have one dtype", where)
        for name, tensor in (("A", A), ("mixture", mixture)):
            if tensor is not None and tensor.device != B.device:
                _refuse(f"{name} is on {tensor.device}, B on {B.device}: move the model or the weights", where)


def check_routed_lora_linear(problem: GroupedLoraLinear, mixture: Tensor, task_ids: Tensor | None) -> None:
    """Raise a ValueError that names the argument, what it is and what it has to be; task ids' values come after."""
    x, weight, A, B = problem.x, problem.weight, problem.d_shrink, problem.d_expand
    assert B is not None
    check_layer(_OP, problem)
    check_inventory(A, B, (weight.shape[1], weight.shape[0]))
    problem.check_factors(_OP)
    check_factors(_OP, x, ("mixture", mixture, None))
    _check_mixture(x, mixture, task_ids, (B.shape[0], B.shape[1]))


def _check_mixture(x: Tensor, mixture: Tensor, task_ids: Tensor | None, heads_skills: tuple[int, int]) -> None:
    leading = tuple(x.shape[:-1])
    if mixture.dim() < 2 or tuple(mixture.shape[-2:]) != heads_skills:
        heads, skills = heads_skills
        _refuse(f"mixture (..., Q = {heads}, S = {skills}) is expected, got {shapes(mixture=mixture)}")
    if task_ids is None:
        prefix = tuple(mixture.shape[:-2])
        if prefix != leading[: len(prefix)]:
            _refuse(
                f"without task_ids the mixture holds weights for leading dimensions of x {leading}, got "
                f"{shapes(mixture=mixture)}; if it is a table with a row a task, task_ids are missing"
            )
        return
    if mixture.dim() != 3:
        _refuse(f"with task_ids the mixture is a table (T, Q, S), got {shapes(mixture=mixture)}")
    _check_integers(task_ids, _OP)
    if task_ids.device != x.device:
        _refuse(f"task_ids are on {task_ids.device}, x on {x.device}: move the input")
    if tuple(task_ids.shape) != leading[: task_ids.dim()]:
        _refuse(f"task_ids for leading dimensions of x {leading} are expected, got {shapes(task_ids=task_ids)}")


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
