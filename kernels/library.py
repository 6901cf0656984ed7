"""The kernels as PyTorch custom operators, so that torch.compile sees each as one opaque call.

An operator costs a dispatch, so eager calls go straight to the host function: the functions here choose.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.library import custom_op

from . import fakes
from .counters import for_compiled_code
from .factor_gradients import factor_gradients as _factor_gradients
from .linearized_lora_linear import linearized_lora_linear as _linearized_lora_linear
from .lora_linear import lora_linear as _lora_linear

# ruff: noqa: UP045  operator schemas are inferred from these annotations, on every supported torch from Optional


@custom_op("linlora::linearized_lora_linear", mutates_args=())
def _linearized_lora_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    shrink: Tensor,
    d_shrink: Optional[Tensor],
    expand: Optional[Tensor],
    d_expand: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,
    adjoint: bool = False,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    with for_compiled_code():
        return _linearized_lora_linear(
            x, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p, seed, adjoint, save
        )


_linearized_lora_linear_op.register_fake(fakes.linearized_lora_linear)


@custom_op("linlora::lora_linear", mutates_args=())
def _lora_linear_op(
    x: Tensor,
    x_tangent: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    shrink: Tensor,
    d_shrink: Optional[Tensor],
    expand: Optional[Tensor],
    d_expand: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,
    adjoint: bool = False,
    primal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _lora_linear(
        x, x_tangent, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p, seed, adjoint, primal
    )


_lora_linear_op.register_fake(fakes.lora_linear)


@custom_op("linlora::factor_gradients", mutates_args=())
def _factor_gradients_op(
    p: Optional[Tensor],
    g: Optional[Tensor],
    q: Optional[Tensor],
    x: Optional[Tensor],
    scaling: float,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    with for_compiled_code():
        return _factor_gradients(p, g, q, x, scaling, out_dtype, dropout_p, seed)


@_factor_gradients_op.register_fake
def _(p, g, q, x, scaling, out_dtype, dropout_p=0.0, seed=None):
    wide = g if g is not None else x
    d_expand = wide.new_empty((0,) if g is None else (g.shape[1], p.shape[1]), dtype=out_dtype)
    d_shrink = wide.new_empty((0,) if x is None else (q.shape[1], x.shape[1]), dtype=out_dtype)
    return d_expand, d_shrink


def linearized_lora_linear(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, c): see `linlora.kernels.linearized_lora_linear`; an opaque operator while torch.compile traces."""
    if torch.compiler.is_compiling():
        return _linearized_lora_linear_op(*args, **kwargs)
    return _linearized_lora_linear(*args, **kwargs)


def lora_linear(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_tangent, u, c): see `linlora.kernels.lora_linear`; an opaque operator while torch.compile traces."""
    if torch.compiler.is_compiling():
        return _lora_linear_op(*args, **kwargs)
    return _lora_linear(*args, **kwargs)


def factor_gradients(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """(d_expand, d_shrink): see `linlora.kernels.factor_gradients`; an opaque operator while torch.compile traces."""
    if torch.compiler.is_compiling():
        return _factor_gradients_op(*args, **kwargs)
    return _factor_gradients(*args, **kwargs)
