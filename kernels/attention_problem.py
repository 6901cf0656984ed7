"""The problem of attention with tangents, in the manner of `problem`."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .packing import Output, packable
from .problem import DTYPES, check_dropout, check_number, refuse, shapes

_FLOATS = "float32, float16, bfloat16 (or float64 on the torch backend)"


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
        return self.q_tangent is not None or self.k_tangent is not None or self.v_tangent is not None

    def primal(self) -> Attention:
        """Attention without its tangents."""
        q, k, v = self[:3]
        return Attention(q, k, v, None, None, None, self.mask, self.causal, self.scale, self.dropout_p, self.seed)

    def outputs(self) -> AttentionResult:
        """What a backend that keeps the softmax's lse returns."""
        o = Output((*self.q.shape[:3], self.v.shape[3]), self.q.dtype)
        return AttentionResult(o, o if self.has_tangents else None, Output(tuple(self.q.shape[:3]), torch.float32))

    def check(self) -> Attention:
        """Itself. Raises a ValueError that names the argument, what it is and what it has to be; dtypes of q, k and v
        may differ here, for autocast."""
        q, k, v, q_tangent, k_tangent, v_tangent, mask, _, scale, dropout_p, seed = self
        device = q.device
        check_number("attention", "scale", scale)
        check_dropout("attention", dropout_p, seed, q)
        if dropout_p > 0.0 and seed is None:
            _refuse("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
        for i, tensor in enumerate(self[:6]):
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                _refuse(f"{self._fields[i]} is {tensor.dtype}: use {_FLOATS}")
            if tensor.device != device:
                _refuse_place(self._fields[i], tensor, device)
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            _refuse(f"(batch, heads, length, head size) is expected, got {shapes(q=q, k=k, v=v)}")
        (batch, heads, queries, width), (k_batch, kv_heads, keys, k_width), (*v_rows, _) = q.shape, k.shape, v.shape
        if [k_batch, kv_heads, keys] != v_rows or batch != k_batch or width != k_width:
            _refuse(f"these do not fit together: {shapes(q=q, k=k, v=v)}")
        if kv_heads == 0 or heads % kv_heads:
            _refuse(f"the heads of q are a multiple of those of k and v, got {shapes(q=q, k=k, v=v)}")
        for name, x, tangent in (("q", q, q_tangent), ("k", k, k_tangent), ("v", v, v_tangent)):
            if tangent is not None and tangent.shape != x.shape:
                _refuse(f"{name}_tangent is {tuple(tangent.shape)}, {name} is {tuple(x.shape)}")
        if mask is not None:
            _check_mask(mask, (batch, heads, queries, keys), device)
        return self


def _check_mask(mask: Tensor, scores: tuple[int, int, int, int], device: torch.device) -> None:
    if mask.dtype is not torch.bool and mask.dtype not in DTYPES:
        _refuse(f"the mask is {mask.dtype}: use bool, True where a query sees a key, or scores to add, {_FLOATS}")
    if mask.device != device:
        _refuse_place("the mask", mask, device)
    sides = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > 4 or any(side not in (1, wanted) for side, wanted in sides):
        _refuse(f"mask {tuple(mask.shape)} does not broadcast to the scores {scores}")
    if mask.requires_grad and torch.is_grad_enabled():
        _refuse("the mask asks for a gradient, which this op does not give; freeze what makes it")


def _refuse_place(name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    _refuse(f"{name} is on {tensor.device}, q on {device}: move the model or the input")


def _refuse(message: str) -> NoReturn:
    refuse("attention", message)
