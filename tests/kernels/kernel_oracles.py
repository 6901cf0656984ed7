"""The ops' formulas in float64, and the one measure of error all kernel tests share."""

from __future__ import annotations

from dataclasses import replace

import torch
from linlora.kernels.configs import Config
from linlora.kernels.problem import LoraLinear, Result
from torch import Tensor

from linlora.reference import keep_mask

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Tiles small enough that odd little matrices have several of them in every direction.
RECOMPUTE = Config("recompute", 16, 32, 32, 64, 4, 2, group_m=2)
SHARED = replace(RECOMPUTE, splits=2)  # two programs a tile, each with a part of K
FLAGS = Config("flags", 16, 32, 32, 64, 4, 2, group_m=2, programs=3)
SPLIT = Config("split", 16, 32, 0, 32, 4, 2, programs=1)
SPLIT_MANY = Config("split", 16, 32, 0, 32, 4, 2, programs=1000)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """‖actual − expected‖ / ‖expected‖ within the tolerance of actual's dtype, and the shapes equal."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


def mask_of(like: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """mask / (1 - p) over a matrix, in float64."""
    if dropout_p == 0.0:
        return 1.0
    return keep_mask(*like.shape, dropout_p, seed).double() / (1.0 - dropout_p)


def lora_linear(problem: LoraLinear) -> Result:
    """The result of one stream or two."""
    x, weight, bias, shrink, expand, d_shrink, d_expand = wide(*problem[:7])
    (x_tangent,), adjoint, two = wide(problem.x_tangent), problem.masks_update, problem.two_streams
    of_input = 1.0 if adjoint else mask_of(x, problem.dropout_p, problem.seed)
    low = x * of_input
    u, c = low @ shrink.t(), None
    if expand is not None:
        c = low @ d_shrink.t()
        if not two:
            c = c + u
        elif x_tangent is not None:
            c = c + (x_tangent * of_input) @ shrink.t()
    update = u @ d_expand.t() + (0 if expand is None else c @ expand.t())
    of_update = mask_of(update, problem.dropout_p, problem.seed) if adjoint else 1.0
    y, update = x @ weight.t() + (0 if bias is None else bias), of_update * problem.scaling * update
    if not two:
        return Result(y + update, None, u, c)
    if expand is not None:
        y = y + of_update * problem.scaling * (u @ expand.t())
    return Result(y, update + (0 if x_tangent is None else x_tangent @ weight.t()), u, c)


def assert_result(actual: Result, expected: Result, save: bool = True, primal: bool = True) -> None:
    """Every output that was asked for is there, in one dtype, and right; no other is there."""
    wanted = expected if save else expected._replace(u=None, c=None)
    wanted = wanted if primal else wanted._replace(y=None)
    for name, found, right in zip(Result._fields, actual, wanted, strict=True):
        assert (found is None) == (right is None), name
        if right is not None:
            assert_close(name, found, right)
    assert len({found.dtype for found in actual if found is not None}) == 1


def layer(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    factor_dtype: torch.dtype | None = None,
    short: bool = False,
    two_streams: bool = False,
) -> LoraLinear:
    """A random layer, scaled so that the frozen product and the update are of one size."""

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(device, of)

    of = factor_dtype or dtype
    return LoraLinear(
        x=random(m, k),
        weight=random(n, k),
        bias=random(n),
        shrink=random(rank, k, of=of),
        expand=None if short else random(n, rank, of=of),
        d_shrink=None if short else random(rank, k, of=of),
        d_expand=random(n, rank, of=of),
        scaling=0.7,
        x_tangent=random(m, k) if two_streams else None,
        two_streams=two_streams,
    )


def dropped(problem: LoraLinear, seed: int, p: float = 0.4, adjoint: bool = False) -> LoraLinear:
    """The layer with dropout, of the shrink's input or in the adjoint of the update."""
    seed_tensor = torch.tensor(seed, device=problem.x.device)
    return problem._replace(dropout_p=p, seed=seed_tensor, masks_update=adjoint)
