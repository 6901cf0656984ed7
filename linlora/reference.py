"""The mathematics of linlora, one function an op, as readable as the formulas.

Shapes, here and in every other layer of the code::

    x, x_tangent   (..., K)     activations and their tangent
    weight         (N, K)       frozen; bias (N,) or None
    A0, dA         (r, K)       down projection at the linearization point, and its tangent
    B0, dB         (N, r)       up projection at the linearization point, and its tangent
    scaling        float        alpha / r, or alpha / sqrt(r) for rsLoRA

Partial linearization (arXiv 2310.04742, eq. 4, applied to one LoRA layer)::

    y    = x Wᵀ + b + s (x A0ᵀ) B0ᵀ                                     primal
    y_t  = x_t Wᵀ + s [ (x_t A0ᵀ) B0ᵀ + (x A0ᵀ) dBᵀ + (x dAᵀ) B0ᵀ ]     tangent

`B0=None` says that the adapter starts at B0 = 0, as PEFT's do. Then `dA` has no effect and may be None.
With `A0` trainable, `B0=None` and `dB` the up projection, the layer is plain LoRA.

Everything here is composed of differentiable aten calls, so it runs in any dtype on any device and under every
`torch.func` transform. It is the oracle of the tests and the form the ops take under a transform.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    x_tangent: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The primal and the tangent of one LoRA layer: two tensors of shape (..., N)."""
    A0, dB = A0.to(x.dtype), dB.to(x.dtype)
    B0, dA = (None if factor is None else factor.to(x.dtype) for factor in (B0, dA))
    low = dropout(x, dropout_p, seed)
    y = linear(x, weight, bias)
    y_tangent = scaling * linear(linear(low, A0), dB)
    if B0 is not None:
        y = y + scaling * linear(linear(low, A0), B0)
        if dA is not None:
            y_tangent = y_tangent + scaling * linear(linear(low, dA), B0)
    if x_tangent is not None:
        y_tangent = y_tangent + linear(x_tangent, weight)
        if B0 is not None:
            low_tangent = dropout(x_tangent, dropout_p, seed)
            y_tangent = y_tangent + scaling * linear(linear(low_tangent, A0), B0)
    return y, y_tangent


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Layer scope: primal + tangent of one LoRA layer whose input has no tangent, shape (..., N)."""
    y, y_tangent = lora_linear(x, weight, bias, A0, B0, dA, dB, scaling, dropout_p=dropout_p, seed=seed)
    return y + y_tangent


def delta_weight(A0: Tensor, B0: Tensor | None, dA: Tensor | None, dB: Tensor, scaling: float) -> Tensor:
    """Layer scope folded into the weight: ΔW = s [ (B0 + dB) A0 + B0 dA ], shape (N, K), rank at most 2r."""
    if B0 is None:
        return scaling * (dB @ A0)
    delta = (B0 + dB) @ A0
    return scaling * (delta if dA is None else delta + B0 @ dA)


def dual_linear(x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b and y_t = x_t Wᵀ."""
    return linear(x, weight, bias), linear(x_tangent, weight)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None = None,
    k_tangent: Tensor | None = None,
    v_tangent: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent, for q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv)::

        S = scale q kᵀ + mask      S_t = scale (q_t kᵀ + q k_tᵀ)
        P = softmax(S)             P_t = P ⊙ (S_t − rowsum(P ⊙ S_t))
        o = (P ⊙ M) v              o_t = (P ⊙ M) v_t + (P_t ⊙ M) v

    M is the dropout mask over 1 − p, element ((b H + h) Sq + i, j) of `keep_mask`; a query that sees no key gets zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_tangent = torch.zeros_like(q) if q_tangent is None else q_tangent
    k_tangent = torch.zeros_like(k) if k_tangent is None else k_tangent
    v_tangent = torch.zeros_like(v) if v_tangent is None else v_tangent
    group = q.shape[1] // k.shape[1]
    k, k_tangent, v, v_tangent = (x.repeat_interleave(group, 1) for x in (k, k_tangent, v, v_tangent))
    S = scale * q @ k.mT
    S_tangent = scale * (q_tangent @ k.mT + q @ k_tangent.mT)
    if mask is not None:
        S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask
    if causal:
        S = S.masked_fill(~torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril(), -torch.inf)
    seen = (-torch.inf < S).any(-1, keepdim=True)
    P = torch.where(seen, torch.softmax(torch.where(seen, S, 0.0), -1), 0.0)
    P_tangent = P * (S_tangent - (P * S_tangent).sum(-1, keepdim=True))
    if dropout_p > 0.0:
        M = keep_mask(P.numel() // max(P.shape[-1], 1), P.shape[-1], dropout_p, seed).view(P.shape).to(P.dtype)
        P, P_tangent = P * M / (1.0 - dropout_p), P_tangent * M / (1.0 - dropout_p)
    return P @ v, P @ v_tangent + P_tangent @ v


def layer_norm(
    x: Tensor, x_tangent: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y = w ⊙ x̂ + b with x̂ = (x − mean) rstd, and y_t = w ⊙ rstd (x_t − mean(x_t) − x̂ mean(x̂ ⊙ x_t))."""
    centered = x - x.mean(-1, keepdim=True)
    y, y_tangent = rms_norm(centered, x_tangent - x_tangent.mean(-1, keepdim=True), weight, eps)
    return y if bias is None else y + bias, y_tangent


def rms_norm(x: Tensor, x_tangent: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = w ⊙ x̂ with x̂ = x rstd, rstd = (mean(x²) + eps)^-½, and y_t = w ⊙ rstd (x_t − x̂ mean(x̂ ⊙ x_t))."""
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = x * rstd
    tangent = rstd * (x_tangent - normalized * (normalized * x_tangent).mean(-1, keepdim=True))
    return (normalized, tangent) if weight is None else (weight * normalized, weight * tangent)


def activation(x: Tensor, x_tangent: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x) x_t, act one of gelu (Φ the normal distribution), its tanh form, silu and relu."""
    if kind == "relu":
        return x.clamp(min=0.0), x_tangent * (x > 0)
    if kind == "silu":
        gate = torch.sigmoid(x)
        return x * gate, x_tangent * gate * (1 + x * (1 - gate))
    if kind == "gelu":
        Phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        phi = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * Phi, x_tangent * (Phi + x * phi)
    if kind == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + t), x_tangent * derivative
    raise ValueError(f"unknown activation {kind!r}: choose 'gelu', 'gelu_tanh', 'silu' or 'relu'")


def gated_activation(
    gate: Tensor, gate_tangent: Tensor | None, up: Tensor, up_tangent: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """SwiGLU and its kin: y = act(gate) ⊙ up and y_t = act'(gate) gate_t ⊙ up + act(gate) ⊙ up_t."""
    opened, opened_tangent = activation(gate, torch.zeros_like(gate) if gate_tangent is None else gate_tangent, kind)
    through = opened_tangent * up
    return opened * up, through if up_tangent is None else through + opened * up_tangent


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of x (..., K) by the mask that (seed, row, column) determine."""
    if p == 0.0:
        return x
    mask = keep_mask(x.numel() // max(x.shape[-1], 1), x.shape[-1], p, seed).view(x.shape)
    return x * (mask.to(x.dtype) / (1.0 - p))


def keep_mask(rows: int, columns: int, p: float, seed: Tensor | None, first_row: int | Tensor = 0) -> Tensor:
    """The dropout mask of `rows` rows, from `first_row` on, as a pure function of `seed`, a 0-d int64 tensor.

    Of several such blocks where `first_row` is an int32 tensor (..., 1): (..., rows, columns).

    Element (i, j) is kept when 31 bits of ``mix(mix(i·φ + seed) + j·φ)`` reach p·2³¹, with φ the 32-bit golden ratio
    and `mix` the finalizer of MurmurHash3. Being a function of the position, the mask is recomputed in backward
    instead of saved, has the same bits in every backend, and serves primal and tangent alike.
    """
    if seed is None:
        raise ValueError("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
    row = (torch.arange(rows, device=seed.device, dtype=torch.int32) + first_row).unsqueeze(-1)
    column = torch.arange(columns, device=seed.device, dtype=torch.int32)
    row_key = _mix(row * _GOLDEN + seed.to(torch.int32))
    return (_mix(row_key + column * _GOLDEN) & 0x7FFFFFFF) >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """p as a 31-bit integer: an element whose hash lies below it is dropped."""
    return min(round(p * 2**31), 2**31 - 1)


_GOLDEN = 0x9E3779B1 - 2**32  # all arithmetic wraps in 32 bits


def _mix(h: Tensor) -> Tensor:
    h ^= (h >> 16) & 0xFFFF
    h *= 0x85EBCA6B - 2**32
    h ^= (h >> 13) & 0x7FFFF
    h *= 0xC2B2AE35 - 2**32
    h ^= (h >> 16) & 0xFFFF
    return h


def mix(inventory: Tensor, mixture: Tensor) -> Tensor:
    """Σ_s w_qs inventory_qs in every head q: (..., Q, a, b) of an inventory (Q, S, a, b) and weights w (..., Q, S)."""
    return torch.einsum("...qs,qsab->...qab", mixture, inventory)


def mix_inventory(A: Tensor | None, B: Tensor, mixture: Tensor) -> tuple[Tensor | None, Tensor]:
    """The factors that weights (..., Q, S) mix from skills A (Q, S, K/Q, r), B (Q, S, r, N/Q) (arXiv 2211.03831)::

    A_z = heads of Σ_s w_qs A_qs  (..., K, r)        B_z = heads of Σ_s w_qs B_qs  (..., r, N)
    """
    mixed_A = None if A is None else mix(A, mixture).flatten(-3, -2)
    return mixed_A, mix(B, mixture).transpose(-3, -2).flatten(-2)


def mix_inventories(
    As: list[Tensor | None], Bs: list[Tensor], mixtures: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """`mix_inventory` of every layer: the factors (T, K, r) and (T, r, N) of T tasks, from weights (T, Q, S)."""
    mixed = [mix_inventory(*layer) for layer in zip(As, Bs, mixtures, strict=True)]
    return [A for A, _ in mixed], [B for _, B in mixed]


def routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor | None = None,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """One LoRA layer whose factors are mixed for every row from S skills in Q heads, (..., N).

    The factors are those of `mix_inventory` and the layer is `grouped_lora_linear`. The mixture is (T, Q, S) with
    task_ids (a row of it for every leading index of x), or the weights themselves, (leading dimensions of x, Q, S).
    """
    B, mixture = B.to(x.dtype), mixture.to(x.dtype)
    w = mixture if task_ids is None else mixture[task_ids]
    w = w.view(*w.shape[:-2], *(1,) * (x.dim() + 1 - w.dim()), *w.shape[-2:])  # dimensions of x that share weights
    A_z, B_z = mix_inventory(None if A is None else A.to(x.dtype), B, w)
    return _row_factors(x, weight, bias, A_z, B_z, scaling, A0, B0, dropout_p, seed)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    task_ids: Tensor,
    scaling: float,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """One LoRA layer with factors A (T, K, r), B (T, r, N) of T tasks, task_ids for leading indices of x, (..., N)::

        y = x Wᵀ + b + s (x A_t) B_t                                    plain
        y = x Wᵀ + b + s [ (x A0ᵀ)(B0ᵀ + B_t) + (x A_t) B0ᵀ ]           linearized at (A0, B0)

    Linearized, A and B are offsets from the point. `B0=None` with an A0 is B0 = 0, and A has no effect then.
    """
    A_t, B_t = _of_rows(x, A, task_ids), _of_rows(x, B, task_ids)
    return _row_factors(x, weight, bias, A_t, B_t, scaling, A0, B0, dropout_p, seed)


def dual_grouped_lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    task_ids: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both streams of the linearized layer, (..., N)::

    y   = x Wᵀ + b + s (x A0ᵀ) B0ᵀ
    y_t = x_t Wᵀ + s [ (x_t A0ᵀ) B0ᵀ + (x A0ᵀ) B_t + (x A_t) B0ᵀ ]
    """
    A_t, B_t, A0 = _of_rows(x, A, task_ids), _of_rows(x, B, task_ids), A0.to(x.dtype)
    low = dropout(x, dropout_p, seed)
    u = linear(low, A0)
    y, y_tangent = linear(x, weight, bias), scaling * (u.unsqueeze(-2) @ B_t).squeeze(-2)
    if B0 is not None:
        B0 = B0.to(x.dtype)
        y = y + scaling * linear(u, B0)
        if A_t is not None:
            y_tangent = y_tangent + scaling * linear((low.unsqueeze(-2) @ A_t).squeeze(-2), B0)
    if x_tangent is not None:
        y_tangent = y_tangent + linear(x_tangent, weight)
        if B0 is not None:
            y_tangent = y_tangent + scaling * linear(linear(dropout(x_tangent, dropout_p, seed), A0), B0)
    return y, y_tangent


def _of_rows(x: Tensor, factors: Any, task_ids: Tensor) -> Any:
    """The factor (..., a, b) of every row of x, from (T, a, b); None of None."""
    if factors is None:
        return None
    of_examples = factors.to(x.dtype)[task_ids]
    shared = (1,) * (x.dim() - 1 - task_ids.dim())
    return of_examples.view(*task_ids.shape, *shared, *factors.shape[1:])


def _row_factors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_z: Tensor | None,
    B_z: Tensor,
    scaling: float,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer with factors A_z (..., K, r), B_z (..., r, N) for every row of x (..., K)."""
    y, low = linear(x, weight, bias), dropout(x, dropout_p, seed)
    row = low.unsqueeze(-2)
    if A0 is None:
        if A_z is None:
            raise ValueError("A is missing: only a layer linearized at A0 and B0 = 0 does without")
        return y + scaling * (row @ A_z @ B_z).squeeze(-2)
    u = linear(low, A0.to(x.dtype))
    update = (u.unsqueeze(-2) @ B_z).squeeze(-2)
    if B0 is not None:
        c = u if A_z is None else u + (row @ A_z).squeeze(-2)
        update = update + linear(c, B0.to(x.dtype))
    return y + scaling * update
