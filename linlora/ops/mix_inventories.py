"""`mix_inventories`: the factors of every task in every layer, mixed from inventories of skills once a forward.

    forward    A_t[q] = Σ_s w_tqs A_qs              B_t[q] = Σ_s w_tqs B_qs
    backward   dA_qs  = Σ_t w_tqs dA_t[q]           dB_qs  = Σ_t w_tqs dB_t[q]
               dw_tqs = ⟨dA_t[q], A_qs⟩ + ⟨dB_t[q], B_qs⟩

One launch mixes all layers, one more "unmixes" all gradients; a sum over columns is taken in an order that does not
depend on the run. Saved for backward: the arguments, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import backends
from linlora.ops.aten.mixing import mix_inventories as composed
from linlora.ops.checks import autocast_enabled
from linlora.ops.composed import backward_backend
from linlora.ops.routing_checks import check_inventories
from linlora.ops.transforms import transform_active


def mix_inventories(
    As: Sequence[Tensor | None], Bs: Sequence[Tensor], mixtures: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Mix the inventories of all layers, each by its own weights.

    Args, lists with an element a layer, which may differ in everything but device and T:
        As: (Q, S, K/Q, r), or None for a layer that is linearized at B0 = 0. Bs: (Q, S, r, N/Q).
        mixtures: (T, Q, S), the weights of T tasks.

    Returns: the mixed factors (T, K, r) (None where A is) and (T, r, N) of every layer, in the wider dtype of factor
    and weights. `grouped_lora_linear` takes them.

    Formula (arXiv 2211.03831, eq. 2, for A and B alike, head q on the q-th block of inputs and outputs)::

        A_t[q] = Σ_s w_tqs A_qs        B_t[q] = Σ_s w_tqs B_qs

    A weight of exactly 0 leaves its skill out: NaN or infinity in it reaches no factor of the task, and what is not
    finite in the task's gradient does not reach the skill's.

    Raises ValueError for lists of different lengths and shapes that do not fit, naming the layer's place in the list.

    >>> import torch
    >>> A, B = torch.randn(4, 8, 16, 2), torch.randn(4, 8, 2, 24)
    >>> (mixed_A,), (mixed_B,) = mix_inventories([A], [B], [torch.full((3, 4, 8), 1 / 8)])
    >>> mixed_A.shape, mixed_B.shape
    (torch.Size([3, 64, 2]), torch.Size([3, 2, 96]))
    """
    As, Bs, mixtures = list(As), list(Bs), list(mixtures)
    check_inventories(As, Bs, mixtures)
    if not Bs:
        return [], []
    if autocast_enabled(Bs[0]):  # of the layers' products, which cast the factors mixed here
        with torch.autocast(Bs[0].device.type, enabled=False):
            return mix_inventories(As, Bs, mixtures)
    empty = any(tensor.numel() == 0 for tensor in (*Bs, *mixtures, *(A for A in As if A is not None)))
    if empty or transform_active() or torch.compiler.is_compiling():
        return composed(As, Bs, mixtures)
    backend = backends.select(Bs[0].device, "routed_lora_linear")
    mixed = _MixInventories.apply(backend, len(Bs), *As, *Bs, *mixtures)
    return list(mixed[: len(Bs)]), list(mixed[len(Bs) :])


class _MixInventories(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, layers: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        As, Bs, mixtures = _thirds(tensors)
        mixed_As, mixed_Bs = backend.mix_inventories(As, Bs, mixtures)
        A_needs, B_needs, w_needs = _thirds(ctx.needs_input_grad[2:])
        constant = [
            factor
            for factors, needs in ((mixed_As, A_needs), (mixed_Bs, B_needs))
            for factor, inventory, w in zip(factors, needs, w_needs, strict=True)
            if factor is not None and not (inventory or w)
        ]
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(*tensors)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return *mixed_As, *mixed_Bs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        backend = backward_backend("mix_inventories", ctx.backend, *gradients)
        As, Bs, mixtures = _thirds(ctx.saved_tensors)
        layers = len(Bs)
        d_As, d_Bs, d_mixtures = backend.unmix_inventories(
            list(gradients[:layers]), list(gradients[layers:]), As, Bs, mixtures,
            *_thirds(ctx.needs_input_grad[2:]),
        )  # fmt: skip
        return None, None, *d_As, *d_Bs, *d_mixtures


def _thirds(of: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    layers = len(of) // 3
    return list(of[:layers]), list(of[layers : 2 * layers]), list(of[2 * layers :])
