"""attention_backward: the gradients of o = softmax(scale q kᵀ + mask) v, from o and lse, in two launches.

    P  = exp(scale q kᵀ + mask − lse)      dP = (g vᵀ) ⊙ M       M = keep/(1-p), or 1 without dropout
    dS = P ⊙ (dP − δ)                      δ  = rowsum(g ⊙ o)
    dq = scale dS k                        dk = scale dSᵀ q      dv = (P ⊙ M)ᵀ g

    g, o (B, H, Sq, Dv)   q, dq (B, H, Sq, D)   k, dk (B, Hkv, Sk, D)   v, dv (B, Hkv, Sk, Dv)   lse, δ (B, H, Sq)

It is the backward of the primal alone: in model scope the tangent o_t carries no gradient.

Two launches, since dq sums over keys and dk and dv over queries: each program owns its sums, so there are no atomics,
and equal inputs give equal bits.

    1  a program owns BLOCK_M queries of a head and walks over the keys:         dq, and δ for the second launch
    2  a program owns BLOCK_N keys of a key head and walks over the queries
       of all its heads, computing Sᵀ and dPᵀ, so that no product transposes     dk, dv
       what it has just computed:

The first launch reads g and o of its queries anyway, and the second would read them once for every block of keys: so
the first computes δ, and no third launch does. Both compute P and dP. In a configuration block_m is the side that is
owned and block_n the one that is walked, in both. Wide heads go in chunks, and blocks that causality masks completely
are skipped, as in `attention`.

Floor: 2·B·H·Sq·Sk·(4D + 3Dv) FLOPs, half of it if causal, of which D + Dv for the second P and dP; every tensor moved
once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_problem import Attention, AttentionResult
from .attention_tiles import (
    LOG2_E,
    alignment,
    attention_config,
    columns_of,
    head,
    heads,
    masked_scores,
    place_of_queries,
    row_products,
    rows_of,
    shared_arguments,
)
from .checks import check_attention, check_attention_outputs
from .configs import Config
from .dropout import keep_mask
from .launch import Launch
from .tiles import dot, load_tile, store_tile


@triton.jit
def load_lse(p_lse, o_lse, m_lse):
    """LOG2_E lse, and +∞ instead for a query that sees no key or lies outside, so that its P is zero."""
    b_lse = tl.load(p_lse + o_lse, mask=m_lse, other=float("-inf")) * LOG2_E
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def probabilities(b_s, b_lse):
    """P = exp2(S − lse) of masked scores.

    At most 1: where a large finite mask fills a row, S and lse are rounded apart by more than exp2 can take.
    """
    return tl.exp2(tl.minimum(b_s - b_lse, 0.0))


@triton.jit
def row_dots(g, o, o_m, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """δ = rowsum(g ⊙ o) of the rows o_m."""
    b_delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for d in range(0, g.columns, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_delta += tl.sum(load_tile(g, o_m, o_d).to(tl.float32) * load_tile(o, o_m, o_d).to(tl.float32), 1)
    return b_delta


@triton.jit
def query_gradient_kernel(
    g,
    q,
    k,
    v,
    o,
    p_lse,
    mask,
    dq,
    p_delta,
    n_heads,
    heads_per_key_head,
    scale,
    dropout,
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    i_query_block, i_chunk, i_batch, i_head, i_key_head, first_row = place_of_queries(
        q.rows, q.columns, n_heads, heads_per_key_head, BLOCK_M, BLOCK_O
    )
    q = head(q, i_batch, i_head, ALIGNMENT)
    g, o = head(g, i_batch, i_head, ALIGNMENT), head(o, i_batch, i_head, ALIGNMENT)
    k, v = head(k, i_batch, i_key_head, ALIGNMENT), head(v, i_batch, i_key_head, ALIGNMENT)

    o_m = i_query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_chunk * BLOCK_O + tl.arange(0, BLOCK_O)
    b_delta = row_dots(g, o, o_m, BLOCK_M, BLOCK_D)
    if i_chunk == 0:
        tl.store(p_delta + first_row + o_m, b_delta, mask=o_m < q.rows)
    b_lse = load_lse(p_lse, first_row + o_m, o_m < q.rows)
    b_q, b_g = rows_of(q, o_m, WHOLE, BLOCK_D), rows_of(g, o_m, WHOLE, BLOCK_D)
    b_dq = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    n_keys = min(k.rows, (i_query_block + 1) * BLOCK_M) if CAUSAL else k.rows
    for n in range(0, n_keys, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_k, b_v = rows_of(k, o_n, WHOLE, BLOCK_D), rows_of(v, o_n, WHOLE, BLOCK_D)
        b_zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        b_s = row_products(b_zero, b_q, q, o_m, b_k, k, o_n, WHOLE, BLOCK_D, PRECISION)
        b_dp = row_products(b_zero, b_g, g, o_m, b_v, v, o_n, WHOLE, BLOCK_D, PRECISION)
        b_s = masked_scores(b_s, o_m[:, None], o_n[None, :], k.rows, mask, i_batch, i_head, scale, CAUSAL, MASK_ROWS)
        b_p = probabilities(b_s, b_lse[:, None])
        if dropout is not None:
            b_dp = tl.where(keep_mask(first_row + o_m, o_n, dropout), b_dp * dropout.inverse_keep, 0.0)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(DTYPE)
        b_dq = dot(b_ds, columns_of(b_k, k, o_n, o_c, WHOLE, BLOCK_D, BLOCK_O), b_dq, PRECISION)
    store_tile(head(dq, i_batch, i_head, ALIGNMENT), b_dq * scale, o_m, o_c)


@triton.jit
def key_gradients_kernel(
    g,
    q,
    k,
    v,
    p_lse,
    mask,
    dk,
    dv,
    p_delta,
    n_heads,
    heads_per_key_head,
    scale,
    dropout,
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = q.pointer.dtype.element_ty
    n_key_blocks, n_chunks = tl.cdiv(k.rows, BLOCK_N), tl.cdiv(max(k.columns, v.columns), BLOCK_O)
    i_key_block = tl.program_id(0) % n_key_blocks  # if causal, the first has most to do
    i_chunk = tl.program_id(0) // n_key_blocks % n_chunks
    i_row_of_heads = tl.program_id(0) // (n_key_blocks * n_chunks)
    n_key_heads = n_heads // heads_per_key_head
    i_batch, i_key_head = i_row_of_heads // n_key_heads, i_row_of_heads % n_key_heads
    k, v = head(k, i_batch, i_key_head, ALIGNMENT), head(v, i_batch, i_key_head, ALIGNMENT)

    o_n = i_key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = i_chunk * BLOCK_O + tl.arange(0, BLOCK_O)
    b_k, b_v = rows_of(k, o_n, WHOLE, BLOCK_D), rows_of(v, o_n, WHOLE, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    first_query = i_key_block * BLOCK_N // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i_query_head in range(heads_per_key_head):
        i_head = i_key_head * heads_per_key_head + i_query_head
        q_of_head, g_of_head = head(q, i_batch, i_head, ALIGNMENT), head(g, i_batch, i_head, ALIGNMENT)
        first_row = (i_batch * n_heads + i_head).to(tl.int64) * q.rows  # of this head in (B·H·Sq, Sk)
        for m in range(first_query, q.rows, BLOCK_M):
            o_m = m + tl.arange(0, BLOCK_M)
            b_q, b_g = rows_of(q_of_head, o_m, WHOLE, BLOCK_D), rows_of(g_of_head, o_m, WHOLE, BLOCK_D)
            b_zero = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            b_s = row_products(b_zero, b_k, k, o_n, b_q, q_of_head, o_m, WHOLE, BLOCK_D, PRECISION)
            b_dp = row_products(b_zero, b_v, v, o_n, b_g, g_of_head, o_m, WHOLE, BLOCK_D, PRECISION)
            b_lse = load_lse(p_lse, first_row + o_m, o_m < q.rows)
            b_delta = tl.load(p_delta + first_row + o_m, mask=o_m < q.rows, other=0.0)
            b_s = masked_scores(
                b_s, o_m[None, :], o_n[:, None], k.rows, mask, i_batch, i_head, scale, CAUSAL, MASK_ROWS
            )
            b_p = probabilities(b_s, b_lse[None, :])
            b_kept = b_p
            if dropout is not None:
                m_keep = tl.trans(keep_mask(first_row + o_m, o_n, dropout))
                b_kept = tl.where(m_keep, b_p * dropout.inverse_keep, 0.0)
                b_dp = tl.where(m_keep, b_dp * dropout.inverse_keep, 0.0)
            b_g = columns_of(b_g, g_of_head, o_m, o_c, WHOLE, BLOCK_D, BLOCK_O)
            b_dv = dot(b_kept.to(DTYPE), b_g, b_dv, PRECISION)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(DTYPE)
            b_q = columns_of(b_q, q_of_head, o_m, o_c, WHOLE, BLOCK_D, BLOCK_O)
            b_dk = dot(b_ds, b_q, b_dk, PRECISION)
    store_tile(head(dk, i_batch, i_key_head, ALIGNMENT), b_dk * scale, o_n, o_c)
    store_tile(head(dv, i_batch, i_key_head, ALIGNMENT), b_dv, o_n, o_c)


def attention_backward(
    problem: Attention, g: Tensor, result: AttentionResult, config: Config | None = None, change: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each like its input, of the cotangent g of o; o and lse as `attention` returned them.

    Two launches, deterministic, no synchronization. `config` overrides what `configs` picks, `change` changes it (see
    `neighbours`). Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    q, k, v = problem[:3]
    check_attention(problem)
    check_attention_outputs(problem, g, result)
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    config = config or attention_config("attention_backward", problem, change)
    if dq.numel() > 0:
        launch_query_gradient(problem, g, result, delta, dq, config).run(q.device)
    if dk.numel() > 0:
        launch_key_gradients(problem, g, result, delta, (dk, dv), config).run(q.device)
    return dq, dk, dv


def launch_query_gradient(
    problem: Attention, g: Tensor, result: AttentionResult, delta: Tensor, dq: Tensor, config: Config
) -> Launch:
    """The first launch, which fills dq and δ."""
    batch, n_heads, queries, size = problem.q.shape
    backward = _arguments(problem, g, result, delta, config)
    return Launch(
        kernel=query_gradient_kernel,
        grid=(batch * n_heads * triton.cdiv(size, backward["BLOCK_O"]) * triton.cdiv(queries, config.block_m),),
        arguments={
            **backward,
            "o": heads(result.o),
            "dq": heads(dq),
            "ALIGNMENT": alignment(g, *problem[:3], result.o, dq),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        config=config,
    )


def launch_key_gradients(
    problem: Attention, g: Tensor, result: AttentionResult, delta: Tensor, dk_dv: tuple[Tensor, Tensor], config: Config
) -> Launch:
    """The second launch, which reads δ and fills dk and dv."""
    (batch, n_key_heads, keys, size), (dk, dv) = problem.k.shape, dk_dv
    backward = _arguments(problem, g, result, delta, config)
    chunks = triton.cdiv(max(size, problem.v.shape[3]), backward["BLOCK_O"])
    return Launch(
        kernel=key_gradients_kernel,
        grid=(batch * n_key_heads * chunks * triton.cdiv(keys, config.block_m),),
        arguments={
            **backward,
            "dk": heads(dk),
            "dv": heads(dv),
            "ALIGNMENT": alignment(g, *problem[:3], dk, dv),
            "BLOCK_M": config.block_n,
            "BLOCK_N": config.block_m,
        },
        config=config,
    )


def _arguments(problem: Attention, g: Tensor, result: AttentionResult, delta: Tensor, config: Config) -> dict[str, Any]:
    """The arguments that both launches have in common."""
    of_g = {"g": heads(g), "p_lse": result.lse.contiguous(), "p_delta": delta}
    return shared_arguments(problem, config) | of_g
