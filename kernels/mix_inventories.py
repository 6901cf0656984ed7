"""mix_inventories: the factors of every task in every layer from inventories of skills, and its adjoint; a launch each.

    mix      A_t[q]  = Σ_s w_tqs A_qs             B_t[q]  = Σ_s w_tqs B_qs
    unmix    dA_qs   = Σ_t w_tqs dA_t[q]          dB_qs   = Σ_t w_tqs dB_t[q]
             dw_tqs  = ⟨dA_t[q], A_qs⟩ + ⟨dB_t[q], B_qs⟩

    layer l:   A (Q, S, K/Q, r)   B (Q, S, r, N/Q)   w (T, Q, S)   A_t (T, K, r)   B_t (T, r, N)

The layers differ in all sizes. They are tables on the device: of addresses, uploaded at every launch, and of sizes,
which a model's layers have once. A program takes one block of columns of one head of one layer, in A or in B, the
"columns" of a skill in a head being its K/Q · r or r · N/Q elements as they lie:

               columns of A_qs        columns of B_qs
             ┌─────┬─────┬───       ┌─────┬─────┬───      one row of programs for every head of every layer
    (l, q)   │     │     │          │     │     │         mix: reads S blocks, writes T
             └─────┴─────┴───       └─────┴─────┴───      unmix: reads S + T, writes S, and a partial (T, S) of dw

A weight of exactly 0 does not select its skill: w · NaN is 0 then, in either direction.

The last program of a (l, q) to arrive adds the partials in the order of the columns and sets its counter back to zero:
the same bits in every run, no floating-point atomics, no second launch.

Kept for backward: the arguments.
Floor: 2 S T (K + N) r FLOPs a layer, twice that backward; (S + T)(K + N) r elements, twice that backward: bytes decide.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_supported
from .configs import Config, select_by_size
from .counters import counters
from .device import device_traits
from .launch import Launch
from .pointers import addresses, is_set, pointer_at

_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_SIZES = tl.constexpr(8)  # of a layer: T, Q, S, columns of A, columns of B, N/Q, N, first row of programs


class Layer(NamedTuple):
    """The sizes of a layer: T tasks, Q heads, S skills, K inputs (0 without A), N outputs, rank r."""

    tasks: int
    heads: int
    skills: int
    inputs: int
    outputs: int
    rank: int


@triton.jit
def block_of(p_sizes, p_programs, BLOCK: tl.constexpr):
    """What this program works at, from the tables."""
    i_program = tl.program_id(0)
    i_layer = tl.load(p_programs + i_program * 3)
    i_head = tl.load(p_programs + i_program * 3 + 1)
    i_block = tl.load(p_programs + i_program * 3 + 2)
    p_layer = p_sizes + i_layer * _SIZES
    A_columns = tl.load(p_layer + 3)
    A_blocks = tl.cdiv(A_columns, BLOCK)
    in_A = i_block < A_blocks
    columns = tl.where(in_A, A_columns, tl.load(p_layer + 4))
    o_column = (i_block - tl.where(in_A, 0, A_blocks)) * BLOCK + tl.arange(0, BLOCK)
    return i_layer, i_head, i_block, p_layer, in_A, columns, o_column


@triton.jit
def mixed_offset(p_layer, i_head, in_A, columns, o_column):
    """Where columns of a head lie in a task's mixed factor, and its size: in A (K, r) in one run, in B (r, N) in r."""
    heads = tl.load(p_layer + 1)
    run = tl.load(p_layer + 5)
    o_B = (o_column // run) * tl.load(p_layer + 6) + i_head * run + o_column % run
    return tl.where(in_A, i_head * columns + o_column, o_B), heads.to(tl.int64) * columns


@triton.jit
def times(b_w, b_tile):
    """w ⊙ tile, a weight a row; 0 where a weight is, whatever it meets."""
    b_wide = b_w.to(tl.float32)[:, None]
    return tl.where(b_wide == 0.0, 0.0, b_wide * b_tile)


@triton.jit
def mix_kernel(
    p_addresses,
    p_sizes,
    p_programs,
    FACTOR: tl.constexpr,
    WEIGHT: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_layer, i_head, _, p_layer, in_A, columns, o_column = block_of(p_sizes, p_programs, BLOCK)
    tasks, heads, skills = tl.load(p_layer), tl.load(p_layer + 1), tl.load(p_layer + 2)
    p_tensors = p_addresses + i_layer * 5  # A, B, w, mixed A, mixed B
    p_factor = pointer_at(p_tensors, tl.where(in_A, 0, 1), FACTOR)
    p_weights = pointer_at(p_tensors, 2, WEIGHT)
    p_mixed = pointer_at(p_tensors, tl.where(in_A, 3, 4), MIXED)
    m_column = o_column < columns
    o_mixed, mixed_size = mixed_offset(p_layer, i_head, in_A, columns, o_column)
    for task in range(0, tasks, BLOCK_T):
        o_t = task + tl.arange(0, BLOCK_T)
        b_mixed = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
        for skill in range(skills):
            b_w = tl.load(p_weights + (o_t * heads + i_head) * skills + skill, mask=o_t < tasks, other=0.0)
            p_skill = p_factor + (i_head * skills + skill).to(tl.int64) * columns
            b_skill = tl.load(p_skill + o_column, mask=m_column, other=0.0)
            b_mixed += times(b_w, b_skill.to(tl.float32)[None, :])
        o_tile = o_t.to(tl.int64)[:, None] * mixed_size + o_mixed[None, :]
        tl.store(p_mixed + o_tile, b_mixed.to(MIXED), mask=(o_t < tasks)[:, None] & m_column[None, :])


@triton.jit
def unmix_kernel(
    p_addresses,
    p_sizes,
    p_programs,
    p_partials,
    p_counters,
    FACTOR: tl.constexpr,
    WEIGHT: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_layer, i_head, i_block, p_layer, in_A, columns, o_column = block_of(p_sizes, p_programs, BLOCK)
    tasks, heads, skills = tl.load(p_layer), tl.load(p_layer + 1), tl.load(p_layer + 2)
    p_tensors = p_addresses + i_layer * 8  # A, B, w, the gradients of mixed A, mixed B, A, B, w
    p_factor = pointer_at(p_tensors, tl.where(in_A, 0, 1), FACTOR)
    p_weights = pointer_at(p_tensors, 2, WEIGHT)
    p_d_mixed = pointer_at(p_tensors, tl.where(in_A, 3, 4), MIXED)
    p_d_factor = pointer_at(p_tensors, tl.where(in_A, 5, 6), FACTOR)
    p_d_weights = pointer_at(p_tensors, 7, WEIGHT)
    m_column = o_column < tl.where(is_set(p_d_mixed), columns, 0)  # without a gradient, without columns
    o_mixed, mixed_size = mixed_offset(p_layer, i_head, in_A, columns, o_column)
    row = tl.load(p_layer + 7) + i_head
    blocks = tl.cdiv(tl.load(p_layer + 3), BLOCK) + tl.cdiv(tl.load(p_layer + 4), BLOCK)
    p_row = p_partials + tl.load(p_programs + tl.num_programs(0) * 3 + row).to(tl.int64)
    partial_size = tasks * skills
    for skill in range(skills):
        o_skill = (i_head * skills + skill).to(tl.int64) * columns + o_column
        b_skill = tl.load(p_factor + o_skill, mask=m_column, other=0.0).to(tl.float32)
        b_d_skill = tl.zeros((BLOCK,), dtype=tl.float32)
        for task in range(0, tasks, BLOCK_T):
            o_t = task + tl.arange(0, BLOCK_T)
            m_tile = (o_t < tasks)[:, None] & m_column[None, :]
            o_tile = o_t.to(tl.int64)[:, None] * mixed_size + o_mixed[None, :]
            b_d_mixed = tl.load(p_d_mixed + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_w = tl.load(p_weights + (o_t * heads + i_head) * skills + skill, mask=o_t < tasks, other=0.0)
            b_d_skill += tl.sum(times(b_w, b_d_mixed), 0)
            if is_set(p_d_weights):
                b_d_w = tl.sum(b_d_mixed * b_skill[None, :], 1)
                tl.store(p_row + i_block * partial_size + o_t * skills + skill, b_d_w, mask=o_t < tasks)
        if is_set(p_d_factor):
            tl.store(p_d_factor + o_skill, b_d_skill.to(FACTOR), mask=m_column)
    if is_set(p_d_weights):
        tl.debug_barrier()  # every thread has stored before one of them releases
        if tl.atomic_add(p_counters + row, 1, sem="acq_rel") == blocks - 1:
            for first in range(0, partial_size, BLOCK):
                o_w = first + tl.arange(0, BLOCK)
                b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
                for block in range(blocks):
                    p_partial = p_row + block * partial_size
                    b_sum += tl.load(p_partial + o_w, mask=o_w < partial_size, other=0.0, cache_modifier=".cg")
                o_d_w = ((o_w // skills) * heads + i_head) * skills + o_w % skills
                tl.store(p_d_weights + o_d_w, b_sum.to(WEIGHT), mask=o_w < partial_size)
            tl.atomic_xchg(p_counters + row, 0, sem="relaxed")


def mix_inventories(
    As: list[Tensor | None], Bs: list[Tensor], mixtures: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The factors (T, K, r) and (T, r, N) of every layer's inventory, in the wider dtype of factor and weights.

    One launch for the layers of one pair of dtypes; no synchronization. Raises ValueError for dtypes and devices that
    the kernels do not know.
    """
    mixed_As: list[Tensor | None] = [None] * len(Bs)
    mixed_Bs: list[Tensor] = list(Bs)
    for indices in _alike(Bs, mixtures):
        tensors: list[Tensor | None] = []
        for i in indices:
            A, B, w = As[i], Bs[i].contiguous(), mixtures[i].contiguous()
            A = None if A is None else A.contiguous()
            layer, dtype = _layer(A, B, w), torch.promote_types(B.dtype, w.dtype)
            mixed_As[i] = None if A is None else B.new_empty(layer.tasks, layer.inputs, layer.rank, dtype=dtype)
            mixed_Bs[i] = B.new_empty(layer.tasks, layer.rank, layer.outputs, dtype=dtype)
            tensors += [A, B, w, mixed_As[i], mixed_Bs[i]]
        _run(mix_launch, [_layer(As[i], Bs[i], mixtures[i]) for i in indices], tensors, 5)
    return mixed_As, mixed_Bs


def unmix_inventories(
    d_As: list[Tensor | None],
    d_Bs: list[Tensor | None],
    As: list[Tensor | None],
    Bs: list[Tensor],
    mixtures: list[Tensor],
    As_need: list[bool],
    Bs_need: list[bool],
    mixtures_need: list[bool],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """The gradients of the inventories and of the weights; None for what is not needed and where no gradient came.

    One launch for the layers of one pair of dtypes; no synchronization, the same bits every time.
    """
    out: tuple[list[Tensor | None], ...] = tuple([None] * len(Bs) for _ in range(3))
    for indices in _alike(Bs, mixtures):
        tensors: list[Tensor | None] = []
        reached = [i for i in indices if d_As[i] is not None or d_Bs[i] is not None]
        for i in reached:
            A, B, w = As[i], Bs[i].contiguous(), mixtures[i].contiguous()
            d_A, d_B = (None if d is None else d.contiguous() for d in (d_As[i], d_Bs[i]))
            if As_need[i] and A is not None and d_A is not None:
                out[0][i] = A.new_empty(A.shape)
            if Bs_need[i] and d_B is not None:
                out[1][i] = B.new_empty(B.shape)
            if mixtures_need[i]:
                out[2][i] = w.new_empty(w.shape)
            tensors += [None if A is None else A.contiguous(), B, w, d_A, d_B, *(gradients[i] for gradients in out)]
        if reached:
            _run(unmix_launch, [_layer(As[i], Bs[i], mixtures[i]) for i in reached], tensors, 8)
    return out  # type: ignore[return-value]


def _alike(Bs: list[Tensor], mixtures: list[Tensor]) -> list[list[int]]:
    """The layers by the dtypes of their factors and weights: those of one launch."""
    by_dtypes = defaultdict(list)
    for i, (B, w) in enumerate(zip(Bs, mixtures, strict=True)):
        check_supported("an inventory", B)
        check_supported("a mixture", w)
        by_dtypes[B.dtype, w.dtype].append(i)
    return list(by_dtypes.values())


def _layer(A: Tensor | None, B: Tensor, mixture: Tensor) -> Layer:
    heads, skills, rank, run = B.shape
    return Layer(mixture.shape[0], heads, skills, 0 if A is None else A.shape[2] * heads, run * heads, rank)


def _run(launch: Callable[..., Launch], layers: list[Layer], tensors: list[Tensor | None], per_layer: int) -> None:
    B, w = tensors[1], tensors[2]
    assert B is not None
    assert w is not None
    config = select_by_size(
        "mix_inventories", size=0, itemsize=B.element_size(), architecture=device_traits(B.device).architecture
    )
    dtypes = (B.dtype, w.dtype, torch.promote_types(B.dtype, w.dtype))
    plan = plan_of(tuple(layers), config.block_n, B.device)
    if plan.programs:
        launch(addresses(tensors, B.device), plan, dtypes, config).run(B.device)


class Plan(NamedTuple):
    """Which program works where, and the sizes of the layers: tables on the device, the same for the same layers."""

    sizes: Tensor  # int32 (layers, _SIZES)
    table: Tensor  # int32: of every program (layer, head, block), then of every (layer, head) its place in partials
    programs: int
    rows: int  # (layer, head) pairs
    partials: int  # elements
    tasks: int  # of the layer with most


@functools.lru_cache(maxsize=64)
def plan_of(layers: tuple[Layer, ...], block: int, device: torch.device) -> Plan:
    """The plan of these layers in blocks of columns; made once for a model."""
    sizes, programs, partials = [], [], 0
    places: list[int] = []
    for i, layer in enumerate(layers):
        A_columns = layer.inputs * layer.rank // layer.heads
        B_columns = layer.outputs * layer.rank // layer.heads
        run = layer.outputs // layer.heads
        sizes.append(
            (layer.tasks, layer.heads, layer.skills, A_columns, B_columns, max(run, 1), layer.outputs, len(places))
        )
        blocks = triton.cdiv(A_columns, block) + triton.cdiv(B_columns, block)
        for head in range(layer.heads):
            programs += [(i, head, block) for block in range(blocks)]
            places.append(partials)
            partials += blocks * layer.tasks * layer.skills
    flat = [number for program in programs for number in program]
    return Plan(
        torch.tensor(sizes, dtype=torch.int32, device=device),
        torch.tensor([*flat, *places], dtype=torch.int32, device=device),
        len(programs),
        len(places),
        partials,
        max(layer.tasks for layer in layers),
    )


def mix_launch(table: Tensor, plan: Plan, dtypes: tuple[torch.dtype, ...], config: Config) -> Launch:
    """The launch that mixes the layers of a plan, tensors at the addresses of `table`."""
    return Launch(mix_kernel, (plan.programs,), _arguments(table, plan, dtypes, config), config)


def unmix_launch(table: Tensor, plan: Plan, dtypes: tuple[torch.dtype, ...], config: Config) -> Launch:
    """The launch of the adjoint."""
    workspace = {
        "p_partials": torch.empty(plan.partials, dtype=torch.float32, device=table.device),
        "p_counters": counters(table.device, plan.rows),
    }
    return Launch(unmix_kernel, (plan.programs,), _arguments(table, plan, dtypes, config) | workspace, config)


def _arguments(table: Tensor, plan: Plan, dtypes: tuple[torch.dtype, ...], config: Config) -> dict:
    factor, weight, mixed = (_TRITON[dtype] for dtype in dtypes)
    return {
        "p_addresses": table,
        "p_sizes": plan.sizes,
        "p_programs": plan.table,
        "FACTOR": factor,
        "WEIGHT": weight,
        "MIXED": mixed,
        "BLOCK_T": min(triton.next_power_of_2(max(plan.tasks, 1)), config.block_m),
        "BLOCK": config.block_n,
    }
