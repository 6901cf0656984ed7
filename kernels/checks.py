"""The constraints on arguments, stated once. Every violation is a ValueError that names what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device import unavailable
from .problem import FactorGradients, LoraLinear

if TYPE_CHECKING:
    from .stacks import Segments

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 256
MAX_GRADIENT_RANK = 2 * MAX_RANK
MAX_HEAD_SIZE = 256
ACTIVATION_KINDS = ("gelu", "gelu_tanh", "silu", "relu")


def check_served(problem: LoraLinear) -> None:
    """A LoRA layer agrees with itself, and the kernels serve it: matrices, their dtypes, the rank, the device."""
    check_activation("x", problem.x)
    problem.check()
    if not 1 <= problem.rank <= MAX_RANK:
        raise ValueError(f"rank {problem.rank} is outside 1..{MAX_RANK}")
    if problem.bias is not None:
        _check_like("bias", problem.bias, tuple(problem.bias.shape), problem.x, factor=True)
    check_dropout(problem.dropout_p, problem.seed, problem.x)


def check_grouped(
    x: Tensor,
    shrink: Tensor | None,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor | None,
    layout: Segments,
    dropout_p: float,
    seed: Tensor | None,
    outputs: int = 0,
) -> int:
    """The rank r, once x (M, K), shrink (K, r), d_shrink (T, K, r), expand (r, N) and d_expand (T, r, N) agree with
    each other and with the layout of the M rows; any may be None, not both of the first two."""
    check_activation("x", x)
    first = d_shrink if shrink is None else shrink
    if first is None:
        raise ValueError("a routed layer has a shrink, a d_shrink, or both")
    (m, k), rank, groups = x.shape, first.shape[-1], layout.first.shape[0] - 1
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} is outside 1..{MAX_RANK}")
    if layout.order.shape[0] != m:
        raise ValueError(f"the groups are of {layout.order.shape[0]} rows, x has {m}")
    for name, factor, shape in (
        ("shrink", shrink, (k, rank)),
        ("d_shrink", d_shrink, (groups, k, rank)),
        ("expand", expand, (rank, outputs)),
        ("d_expand", d_expand, (groups, rank, outputs)),
    ):
        if factor is not None:
            _check_like(name, factor, shape, x, factor=True)
    check_dropout(dropout_p, seed, x)
    return rank


def check_linear_weight(x: Tensor, weight: Tensor, bias: Tensor | None, x_tangent: Tensor | None = None) -> None:
    """x and x_tangent (M, K), weight (N, K) and bias (N,) agree; a tangent may be absent."""
    check_linear(x, x if x_tangent is None else x_tangent, weight, bias)


def check_linear(x: Tensor, x_tangent: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """x and x_tangent (M, K), weight (N, K) and bias (N,) agree."""
    check_activation("x", x)
    if x_tangent is None:
        raise ValueError("x_tangent is None; linear needs both streams, one alone is torch.nn.functional.linear")
    _check_like("x_tangent", x_tangent, tuple(x.shape), x, factor=False)
    if weight.ndim != 2:
        raise ValueError(f"weight is 2-D (N, {x.shape[1]}), got {tuple(weight.shape)}")
    _check_like("weight", weight, (weight.shape[0], x.shape[1]), x, factor=False)
    if bias is not None:
        _check_like("bias", bias, (weight.shape[0],), x, factor=True)


def check_norm(x: Tensor, x_tangent: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """x and x_tangent (M, N), weight and bias (N,) agree."""
    check_activation("x", x)
    features = x.shape[1]
    if features == 0:
        raise ValueError(f"x has features to normalise over, got {tuple(x.shape)}")
    if x_tangent is not None:
        _check_like("x_tangent", x_tangent, tuple(x.shape), x, factor=False)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _check_like(name, vector, (features,), x, factor=True)


def check_norm_backward(g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor) -> None:
    """g and x (M, N), weight (N,), mean and rstd (M,) as the forward returned them."""
    check_norm(x, None, weight, None)
    _check_like("g", g, tuple(x.shape), x, factor=False)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is not None:
            _check_placed(name, statistic, (x.shape[0],), x)
            if statistic.dtype is not torch.float32:
                raise ValueError(f"{name} is torch.float32, as the forward returned it, got {statistic.dtype}")


def check_elementwise(kind: str, **tensors: Tensor | None) -> None:
    """kind is known, and every tensor is like the first one, in any shape."""
    if kind not in ACTIVATION_KINDS:
        raise ValueError(f"kind is one of {', '.join(ACTIVATION_KINDS)}, got {kind!r}")
    (name, first), *others = tensors.items()
    check_supported(name, first)
    for name, tensor in others:
        if tensor is not None:
            _check_like(name, tensor, tuple(first.shape), first, factor=False)


def check_factor_gradients(problem: FactorGradients) -> None:
    """Both pairs agree, and the kernel serves their dtype, ranks and device."""
    problem.check()
    check_activation("x" if problem.g is None else "g", problem.wide)
    for name, low in (("p", problem.p), ("q", problem.q)):
        if low is not None and not 1 <= low.shape[1] <= MAX_GRADIENT_RANK:
            raise ValueError(f"{name} is (M, R) with R in 1..{MAX_GRADIENT_RANK}, got {tuple(low.shape)}")
    check_dropout(problem.dropout_p, problem.seed, problem.wide)


def check_gradient(name: str, low: Tensor | None, other_name: str, wide: Tensor | None) -> None:
    """One product of `factor_gradients`: low (M, R) and wide (M, columns), or neither."""
    if (low is None) != (wide is None):
        raise ValueError(f"{name} and {other_name} come together: pass both or neither")
    if low is None or wide is None:
        return
    check_activation(other_name, wide)
    if low.ndim != 2 or not 1 <= low.shape[1] <= MAX_GRADIENT_RANK:
        raise ValueError(f"{name} is (M, R) with R in 1..{MAX_GRADIENT_RANK}, got {tuple(low.shape)}")
    _check_like(name, low, (wide.shape[0], low.shape[1]), wide, factor=False)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    tangents: tuple[Tensor | None, ...] = (),
) -> None:
    """q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) agree, tangents with them, and the mask broadcasts."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} is 4-D (batch, heads, sequence, head size), got {tuple(x.shape)}")
        if not 1 <= x.shape[3] <= MAX_HEAD_SIZE:
            raise ValueError(f"the head size of {name} is in 1..{MAX_HEAD_SIZE}, got {x.shape[3]}")
    check_supported("q", q)
    (batch, n_heads, _, size), (n_key_heads, keys) = q.shape, k.shape[1:3]
    if n_key_heads < 1 or n_heads % n_key_heads != 0:
        raise ValueError(f"the heads of q are a multiple of those of k, got {n_heads} and {n_key_heads}")
    _check_like("k", k, (batch, n_key_heads, keys, size), q, factor=False)
    _check_like("v", v, (batch, n_key_heads, keys, v.shape[3]), q, factor=False)
    for name, primal, tangent in zip(("q_tangent", "k_tangent", "v_tangent"), (q, k, v), tangents, strict=False):
        if tangent is not None:
            _check_like(name, tangent, tuple(primal.shape), q, factor=False)
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], keys), q)
    check_dropout(dropout_p, seed, q)


def check_attention_outputs(g: Tensor, o: Tensor, lse: Tensor, q: Tensor, v: Tensor) -> None:
    """o and lse are what `attention` returned for q and v, g the cotangent of o."""
    for name, x in (("g", g), ("o", o)):
        _check_like(name, x, (*q.shape[:3], v.shape[3]), q, factor=False)
    if lse.shape != q.shape[:3] or lse.dtype is not torch.float32 or lse.device != q.device:
        expected = f"torch.float32 {tuple(q.shape[:3])} on {q.device}"
        raise ValueError(f"lse is {expected}, got {lse.dtype} {tuple(lse.shape)} on {lse.device}")


def _check_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask is bool (True = attend) or floating (added to the scores), got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, the activations are on {q.device}")
    # zip from the right, as broadcasting does
    sides = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > 4 or any(side not in (1, expected) for side, expected in sides):
        raise ValueError(f"mask broadcasts to {shape} (batch, heads, queries, keys), got {tuple(mask.shape)}")


def check_activation(name: str, x: Tensor) -> None:
    """x is a matrix that the kernels can read."""
    if x.ndim != 2:
        raise ValueError(f"{name} is 2-D (rows, features), got {tuple(x.shape)}; flatten the leading dimensions")
    check_supported(name, x)


def check_supported(name: str, x: Tensor) -> None:
    """x is of a dtype the kernels know, on a device they run on."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{name} is fp32, fp16 or bf16, got {x.dtype}")
    reason = unavailable(x.device)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot run: {reason}")


def check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return
    if seed is None:
        raise ValueError("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
    if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(
            f"seed is a 0-d int64 tensor on {x.device}, got {seed.dtype} {tuple(seed.shape)} {seed.device}"
        )


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, *, factor: bool) -> None:
    _check_placed(name, tensor, shape, x)
    if tensor.dtype != x.dtype and not (factor and tensor.dtype is torch.float32):
        accepted = f"{x.dtype} or torch.float32" if factor and x.dtype is not torch.float32 else f"{x.dtype}"
        raise ValueError(f"{name} is {accepted} beside {x.dtype} activations, got {tensor.dtype}")


def _check_placed(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {shape} here, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, the activations are on {x.device}")
