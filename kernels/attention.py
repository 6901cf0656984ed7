"""attention: o = softmax(scale q kᵀ + mask) v and its tangent o_t, in one launch and O(S) memory.

    S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
    P = softmax(S)                 o   = P v                             lse = logsumexp(S)
    w = rowsum(P ⊙ S_t)            o_t = P v_t + (P ⊙ S_t) v − w ⊙ o  =  P v_t + [P ⊙ (S_t − w)] v

    q, q_t (B, H, Sq, D)   k, k_t (B, Hkv, Sk, D)   v, v_t (B, Hkv, Sk, Dv)   o, o_t (B, H, Sq, Dv)   lse (B, H, Sq)
    dropout: P ⊙ M in place of P before v and v_t, but not in w; M = keep/(1-p), its rows those of (B·H·Sq, Sk)

A tangent that is None is zero, and the kernel compiles without it. H is a multiple of Hkv: H/Hkv heads of q, one after
the other, share a head of k and v.

                                BLOCK_N keys →
                              ┌────────────┬───
                            D │  kᵀ, k_tᵀ  │ …              Dv
                   D          └────────────┴───       ┌───────────┐
              ┌─────────┐     ┌────────────┬───       │   v, v_t  │ BLOCK_N keys
      BLOCK_M │ q, q_t  │     │ S, S_t → P │ …        ├───────────┤
      queries └─────────┘     └────────────┴───       │     …     │
                                      three products ↑, three more →   o, o_t (BLOCK_M, Dv)

A program owns BLOCK_M queries of a head and walks over the keys: six products for the four blocks it loads, where plain
attention has two for two. The softmax is online: with every block the running maximum m and sum of exp(S − m)
change, and o and o_t are rescaled.

So does w, the mean of S_t under P so far. It is subtracted before P ⊙ (S_t − w) is rounded for its product, and o_t
moves by −Δw ⊙ o. Keys often have a large part in common, hence all of S_t has; it cancels here before it is rounded,
where (P ⊙ S_t) v − w ⊙ o would lose its digits (in bf16, with a common part 8 times the rest: an error of 1.5e-2
instead of 1.6e-3, in float32 arithmetic that rounds as the kernel does).

Heads wider than BLOCK_D (BLOCK_O) go in chunks: the products over the head size in a loop, which loads q again for
every block of keys, and the columns of o and o_t in as many programs, each of which computes the scores again. Key
blocks that causality (key j ≤ query i) masks completely are skipped. A query that sees no key gets o = o_t = 0 and
lse = −∞.

Kept for backward: q, k, v, o and lse.
Floor: 6·B·H·Sq·Sk·(D + Dv) FLOPs, half of it if causal; every tensor moved once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_problem import Attention, AttentionResult
from .attention_tiles import (
    LOG2_E,
    alignment,
    attention_config,
    head,
    heads,
    masked_scores,
    place_of_queries,
    row_products,
    rows_of,
    shared_arguments,
)
from .checks import check_attention
from .configs import Config
from .dropout import keep_mask
from .launch import Launch
from .packing import empty
from .tiles import dot, load_tile, store_tile


@triton.jit
def softmax_step(b_s, b_max, b_sum):
    """(exp2(S − max), rescale, max, sum): maximum and sum brought up to date, and the factor for older sums."""
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_finite_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # no key seen so far
    b_p = tl.exp2(b_s - b_finite_max[:, None])
    b_rescale = tl.exp2(b_max - b_finite_max)
    return b_p, b_rescale, b_new_max, b_sum * b_rescale + tl.sum(b_p, 1)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    q_tangent,
    k_tangent,
    v_tangent,
    mask,
    o,
    o_tangent,
    p_lse,
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
    SCORES_MOVE: tl.constexpr = q_tangent is not None or k_tangent is not None
    i_query_block, i_chunk, i_batch, i_head, i_key_head, first_row = place_of_queries(
        q.rows, v.columns, n_heads, heads_per_key_head, BLOCK_M, BLOCK_O
    )
    q = head(q, i_batch, i_head, ALIGNMENT)
    k, v = head(k, i_batch, i_key_head, ALIGNMENT), head(v, i_batch, i_key_head, ALIGNMENT)
    if q_tangent is not None:
        q_tangent = head(q_tangent, i_batch, i_head, ALIGNMENT)
    if k_tangent is not None:
        k_tangent = head(k_tangent, i_batch, i_key_head, ALIGNMENT)
    if v_tangent is not None:
        v_tangent = head(v_tangent, i_batch, i_key_head, ALIGNMENT)

    o_m = i_query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_chunk * BLOCK_O + tl.arange(0, BLOCK_O)
    b_q = rows_of(q, o_m, WHOLE, BLOCK_D)
    if q_tangent is not None:
        b_q_tangent = rows_of(q_tangent, o_m, WHOLE, BLOCK_D)

    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_w = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    b_o_tangent = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    n_keys = min(k.rows, (i_query_block + 1) * BLOCK_M) if CAUSAL else k.rows
    for n in range(0, n_keys, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_k = rows_of(k, o_n, WHOLE, BLOCK_D)
        b_s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        b_s = row_products(b_s, b_q, q, o_m, b_k, k, o_n, WHOLE, BLOCK_D, PRECISION)
        b_s = masked_scores(b_s, o_m[:, None], o_n[None, :], k.rows, mask, i_batch, i_head, scale, CAUSAL, MASK_ROWS)
        b_p, b_rescale, b_max, b_sum = softmax_step(b_s, b_max, b_sum)

        if SCORES_MOVE:
            b_s_tangent = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if q_tangent is not None:
                b_s_tangent = row_products(
                    b_s_tangent, b_q_tangent, q_tangent, o_m, b_k, k, o_n, WHOLE, BLOCK_D, PRECISION
                )
            if k_tangent is not None:
                b_k_tangent = rows_of(k_tangent, o_n, WHOLE, BLOCK_D)
                b_s_tangent = row_products(
                    b_s_tangent, b_q, q, o_m, b_k_tangent, k_tangent, o_n, WHOLE, BLOCK_D, PRECISION
                )
            b_s_tangent = b_s_tangent * scale - b_w[:, None]
            b_step = tl.sum(b_p * b_s_tangent, 1) / tl.where(b_sum > 0.0, b_sum, 1.0)
            b_w += b_step
            b_p_tangent = b_p * (b_s_tangent - b_step[:, None])
            b_o_tangent -= b_step[:, None] * b_o

        if dropout is not None:
            m_keep = keep_mask(first_row + o_m, o_n, dropout)
            b_p = tl.where(m_keep, b_p * dropout.inverse_keep, 0.0)
            if SCORES_MOVE:
                b_p_tangent = tl.where(m_keep, b_p_tangent * dropout.inverse_keep, 0.0)
        b_v = load_tile(v, o_n, o_c)
        b_o = dot(b_p.to(DTYPE), b_v, b_o * b_rescale[:, None], PRECISION)
        b_o_tangent *= b_rescale[:, None]
        if v_tangent is not None:
            b_o_tangent = dot(b_p.to(DTYPE), load_tile(v_tangent, o_n, o_c), b_o_tangent, PRECISION)
        if SCORES_MOVE:
            b_o_tangent = dot(b_p_tangent.to(DTYPE), b_v, b_o_tangent, PRECISION)

    b_sum = tl.where(b_sum > 0.0, b_sum, 1.0)  # of a query that sees no key: 0 / 1, and lse = −∞ by its maximum
    if i_chunk == 0:
        tl.store(p_lse + first_row + o_m, (b_max + tl.log2(b_sum)) / LOG2_E, mask=o_m < q.rows)
    store_tile(head(o, i_batch, i_head, ALIGNMENT), b_o / b_sum[:, None], o_m, o_c)
    if o_tangent is not None:
        store_tile(head(o_tangent, i_batch, i_head, ALIGNMENT), b_o_tangent / b_sum[:, None], o_m, o_c)


def attention(problem: Attention, config: Config | None = None, change: str = "") -> AttentionResult:
    """o, o_tangent where an input has a tangent, and lse; one launch, no synchronization.

    In a floating mask anything below −2.3e38 (the least fp32 or bf16) counts as −∞. `config` overrides what `configs`
    picks, `change` changes it (see `neighbours`). Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check_attention(problem)
    result = empty(problem.outputs(), problem.q)
    if result.o.numel() > 0:
        launch(problem, result, config or attention_config("attention", problem, change)).run(problem.q.device)
    return result


def launch(problem: Attention, result: AttentionResult, config: Config) -> Launch:
    """The launch that fills the result."""
    batch, n_heads, queries, _ = problem.q.shape
    shared = shared_arguments(problem, config)
    chunks = triton.cdiv(problem.v.shape[3], shared["BLOCK_O"])
    return Launch(
        kernel=attention_kernel,
        grid=(batch * n_heads * chunks * triton.cdiv(queries, config.block_m),),
        arguments={
            **shared,
            "q_tangent": heads(problem.q_tangent),
            "k_tangent": heads(problem.k_tangent),
            "v_tangent": heads(problem.v_tangent),
            "o": heads(result.o),
            "o_tangent": heads(result.o_tangent),
            "p_lse": result.lse,
            "ALIGNMENT": alignment(*problem[:6], result.o, result.o_tangent),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        config=config,
    )
