"""The constraints on arguments, stated once. Every violation is a ValueError that names what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_problem import Attention, AttentionResult
from .device import unavailable
from .grouped_problem import GroupedGradients, GroupedLoraLinear
from .norm_problem import Norm, NormResult
from .problem import FactorGradients, LoraLinear, check_dropout

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
    for name, tensor in zip(problem._fields[1:7], problem[1:7], strict=True):
        if tensor is not None:
            _check_like(name, tensor, tuple(tensor.shape), problem.x, factor=name != "weight")
    check_mask(problem.dropout_p, problem.seed, problem.x)


def check_grouped(problem: GroupedLoraLinear) -> int:
    """The rank r, once a problem of matrices agrees with itself and its rows' layout, and the kernels serve it."""
    x, weight, bias = problem[:3]
    check_activation("x", x)
    if problem.shrink is None and problem.d_shrink is None:
        raise ValueError("a routed layer has a shrink, a d_shrink, or both")
    (m, k), n, rank, groups = x.shape, weight.shape[0], problem.rank, problem.groups.first.shape[0] - 1
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} is outside 1..{MAX_RANK}")
    if problem.groups.order.shape[0] != m:
        raise ValueError(f"the groups are of {problem.groups.order.shape[0]} rows, x has {m}")
    for name, tensor, shape, factor in (
        ("weight", weight, (n, k), False),
        ("bias", bias, (n,), True),
        ("x_tangent", problem.x_tangent, (m, k), False),
        ("shrink", problem.shrink, (rank, k), True),
        ("expand", problem.expand, (n, rank), True),
        ("d_shrink", problem.d_shrink, (groups, k, rank), True),
        ("d_expand", problem.d_expand, (groups, rank, n), True),
    ):
        if tensor is not None:
            _check_like(name, tensor, shape, x, factor=factor)
    check_mask(problem.dropout_p, problem.seed, x)
    return rank


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


def check_norm(problem: Norm) -> None:
    """x and x_tangent (M, N), weight and bias (N,) agree."""
    x = problem.x
    check_activation("x", x)
    features = x.shape[1]
    if features == 0:
        raise ValueError(f"x has features to normalise over, got {tuple(x.shape)}")
    if problem.x_tangent is not None:
        _check_like("x_tangent", problem.x_tangent, tuple(x.shape), x, factor=False)
    for name, vector in (("weight", problem.weight), ("bias", problem.bias)):
        if vector is not None:
            _check_like(name, vector, (features,), x, factor=True)


def check_norm_backward(problem: Norm, g: Tensor, result: NormResult) -> None:
    """g (M, N) is the cotangent of y, mean and rstd (M,) are as the forward returned them."""
    x = problem.x
    check_norm(problem)
    _check_like("g", g, tuple(x.shape), x, factor=False)
    for name, statistic in (("mean", result.mean), ("rstd", result.rstd)):
        if statistic is not None:
            _check_placed(name, statistic, (x.shape[0],), x)
            if statistic.dtype is not torch.float32:
                raise ValueError(f"{name} is torch.float32, as the forward returned it, got {statistic.dtype}")


def check_elementwise(kind: str, **tensors: Tensor | None) -> None:
    """kind is known, and every tensor is like the first one, in any shape."""
    if kind not in ACTIVATION_KINDS:
        raise ValueError(f"kind is one of {', '.join(ACTIVATION_KINDS)}, got {kind!r}")
    (name, first), *others = tensors.items()
    assert first is not None
    check_supported(name, first)
    for name, tensor in others:
        if tensor is not None:
            _check_like(name, tensor, tuple(first.shape), first, factor=False)


def check_gradients(problem: FactorGradients | GroupedGradients) -> None:
    """Both pairs agree, and the kernels serve their dtype, ranks and device."""
    problem.check()
    check_activation("x" if problem.g is None else "g", problem.wide)
    for name, low in (("p", problem.p), ("q", problem.q)):
        if low is not None and not 1 <= low.shape[1] <= MAX_GRADIENT_RANK:
            raise ValueError(f"{name} is (M, R) with R in 1..{MAX_GRADIENT_RANK}, got {tuple(low.shape)}")
    check_mask(problem.dropout_p, problem.seed, problem.wide)


def check_attention(problem: Attention) -> None:
    """A problem agrees with itself, and the kernels serve it: one dtype, the head sizes, the device."""
    problem.check()
    check_supported("q", problem.q)
    for name, x in zip(problem._fields[:6], problem[:6], strict=True):
        if x is not None:
            _check_like(name, x, tuple(x.shape), problem.q, factor=False)
            if not 1 <= x.shape[3] <= MAX_HEAD_SIZE:
                raise ValueError(f"the head size of {name} is in 1..{MAX_HEAD_SIZE}, got {x.shape[3]}")
    check_mask(problem.dropout_p, problem.seed, problem.q)


def check_attention_outputs(problem: Attention, g: Tensor, result: AttentionResult) -> None:
    """o and lse are what `attention` returned for the problem, g the cotangent of o."""
    q, o, lse = problem.q, *problem.primal().outputs()[::2]
    for name, x in (("g", g), ("o", result.o)):
        _check_like(name, x, o.shape, q, factor=False)
    if result.lse.shape != lse.shape or result.lse.dtype is not lse.dtype or result.lse.device != q.device:
        got = f"{result.lse.dtype} {tuple(result.lse.shape)} on {result.lse.device}"
        raise ValueError(f"lse is {lse.dtype} {lse.shape} on {q.device}, got {got}")


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


def check_mask(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    """Dropout is a probability, with a seed that the kernels can read."""
    check_dropout("dropout", dropout_p, seed, x)
    if dropout_p > 0.0 and seed is None:
        raise ValueError("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")


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
