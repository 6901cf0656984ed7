"""The problem of attention with tangents, in the manner of `problem`."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .packing import Output, packable
from .problem import DTYPES, check_dropout, check_number, refuse


class AttentionResult(NamedTuple):
    """What attention gives; None for what was not asked for, or is not kept."""

    o: Any  # (B, H, Sq, Dv)
    o_tangent: Any = None  # like o, where an input has a tangent
    lse: Any = None  # (B, H, Sq) in float32, log Σ exp S, of backends whose backward asks for it


@packable
class Attention(NamedTuple):
    """Softmax attention and its tangent::

        S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
        P = softmax(S)                 o   = P v
        o_t = P v_t + (P ⊙ S_t) v − rowsum(P ⊙ S_t) ⊙ o

    With dropout one mask, a hash of its position, multiplies P and P ⊙ S_t where they meet the values (not in the row
    sum). A query that sees no key gets zeros.
    """

    q: Tensor  # (B, H, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D), H a multiple of Hkv
    v: Tensor  # (B, Hkv, Sk, Dv)
    q_tangent: Tensor | None = None  # like q; None is zero
    k_tangent: Tensor | None = None
    v_tangent: Tensor | None = None
    mask: Tensor | None = None  # broadcasts to (B, H, Sq, Sk): bool, True where a query sees a key, or added to S
    causal: bool = False  # query i sees the keys j <= i, of those the mask leaves
    scale: Any = None  # a number; for a backend never None
    dropout_p: float = 0.0
    seed: Tensor | None = None  # 0-d int64

    @property
    def tangents(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self[3:6]

    @property
    def has_tangents(self) -> bool:
        return any(tangent is not None for tangent in self.tangents)

    def primal(self) -> Attention:
        """Attention without its tangents."""
        return self._replace(q_tangent=None, k_tangent=None, v_tangent=None)

    def outputs(self) -> AttentionResult:
        """What a backend that keeps the softmax's lse returns."""
        o = Output((*self.q.shape[:3], self.v.shape[3]), self.q.dtype)
        return AttentionResult(o, o if self.has_tangents else None, Output(tuple(self.q.shape[:3]), torch.float32))

    def check(self) -> Attention:
        """Itself. Raises a ValueError that names the argument, what it is and what it has to be; dtypes of q, k and v
        may differ here, for autocast."""
        q, k, v, *tangents, mask, _, scale, dropout_p, seed = self
        check_number("attention", "scale", scale)
        check_dropout("attention", dropout_p)
        if dropout_p > 0.0 and seed is None:
            _refuse("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
        floats = "float32, float16, bfloat16 (or float64 on the torch backend)"
        for name, tensor in zip(self._fields[:6], self[:6], strict=True):
            if tensor is not None and tensor.dtype not in DTYPES:
                _refuse(f"{name} is {tensor.dtype}: use {floats}")
        if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
            _refuse(f"the mask is {mask.dtype}: use bool, True where a query sees a key, or scores to add, {floats}")
        names = ("k", "v", "q_tangent", "k_tangent", "v_tangent", "the mask")
        for name, tensor in zip(names, self[1:7], strict=True):
            if tensor is not None and tensor.device != q.device:
                _refuse(f"{name} is on {tensor.device}, q on {q.device}: move the model or the input")
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            _refuse(f"(batch, heads, length, head size) is expected, got {shapes}")
        if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            _refuse(f"these do not fit together: {shapes}")
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            _refuse(f"the heads of q are a multiple of those of k and v, got {shapes}")
        for name, x, tangent in zip("qkv", (q, k, v), tangents, strict=True):
            if tangent is not None and tangent.shape != x.shape:
                _refuse(f"{name}_tangent is {tuple(tangent.shape)}, {name} is {tuple(x.shape)}")
        if mask is not None:
            scores = (*q.shape[:3], k.shape[2])
            sides = zip(reversed(mask.shape), reversed(scores), strict=False)
            if mask.dim() > 4 or any(side not in (1, wanted) for side, wanted in sides):
                _refuse(f"mask {tuple(mask.shape)} does not broadcast to the scores {scores}")
            if mask.requires_grad and torch.is_grad_enabled():
                _refuse("the mask asks for a gradient, which this op does not give; freeze what makes it")
        return self


def _refuse(message: str) -> NoReturn:
    refuse("attention", message)
