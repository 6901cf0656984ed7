"""Runs one layer on a batch whose rows each have their own mixture of adapters (`linlora.layers.mixtures`).

Adapters of any rank, plain and linearized (each at its own point), become factors of one layout, and the layer runs as
one grouped op. A mixture is the adapters side by side, of the summed rank and each with its weight in B, so that the
update of a row is Σ λ ΔW of its adapters, without cross terms:

    y = x Wᵀ + b + Σ_a λ_a s_a (x A_aᵀ) B_aᵀ = x Wᵀ + b + (x [A_1; A_2; …]ᵀ) [λ_1 s_1 B_1, λ_2 s_2 B_2, …]ᵀ

Rows of one mixture are a group. Where all rows have the same adapters and other weights, they share the factors, and a
row's weights scale its activations:

    y = x Wᵀ + b + (λ ⊙ (x [A_1; A_2; …]ᵀ)) [s_1 B_1, s_2 B_2, …]ᵀ

An adapter that no row of the batch has is not read. Its gradient is None, which optimizers skip, not zeros.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from linlora.kernels.problem import LoraLinear
from linlora.kernels.uploads import upload
from linlora.layers.adapters import LoraAdapters, check_input
from linlora.layers.called import called_plain_update, called_update
from linlora.layers.calls import beyond_product, is_product
from linlora.layers.mixtures import Mixture, Rows
from linlora.layers.weights import stacked
from linlora.ops import aten, backends
from linlora.ops.checks import autocast_input
from linlora.ops.grouped_lora_linear import grouped_lora_linear
from linlora.ops.lora_linear import run


def mixed_batch(layer: LoraAdapters, x: Tensor, rows: Rows) -> Tensor:
    """One layer at layer scope on a batch x (examples, ..., K) with a mixture for every example.

    Another number of rows and merged adapters the layer has refused in PEFT's words. Raises ValueError at model scope.
    """
    begin_mixed(layer, rows)
    adapters = [name for name in rows.adapters if name in layer.lora_A]
    dropouts = layer.dropouts(adapters) or {0.0}
    why = layer.why_called(adapters)
    if why is None and not is_product(layer.base_layer):
        why = f"its base layer {beyond_product(layer.base_layer)}"
    if why is not None:
        layer.warn_of_calls(why)
    elif len(dropouts) > 1 or dropouts == {1.0}:
        warnings.warn(
            f"layer '{layer.layer_name}': adapters {adapters} have dropouts {sorted(dropouts)} in one batch, so each "
            "is called on its rows; with one dropout below 1 they run as one op",
            stacklevel=2,
        )
    else:
        check_input(layer.layer_name, autocast_input(x), layer.matrix)
        return _one_op(layer, x, rows, dropouts.pop())
    return called_by_rows(layer, x, rows)


def begin_mixed(layer: LoraAdapters, rows: Rows) -> None:
    """Note that the layer runs with rows of its own, which it does at layer scope alone."""
    if layer.stream is not None:
        raise ValueError(
            f"layer '{layer.layer_name}': adapters linearized at model scope share one point in a batch. Put their "
            "task vectors into one model, linlora.routing.from_vectors(model, vectors), with task_ids= or mixture=; to "
            "train several together, linlora.routing.route(model, n_tasks, variant='private')"
        )
    layer.mixed = layer.mixed or rows.may_be_lost


def called_by_rows(layer: LoraAdapters, x: Tensor, rows: Rows) -> Tensor:
    """The base layer called, and the parts of every adapter on the rows that have it."""
    y = layer.base_layer(x)
    for adapter in (name for name in rows.adapters if name in layer.lora_A):
        places, weights = rows.weights_of(adapter)
        at = upload(places, torch.int64, x.device)
        if layer.states[adapter] == "plain":
            update = called_plain_update(layer, adapter, x[at])
        else:
            update = torch.add(*called_update(layer, [adapter], x[at]))
        of_rows = upload(weights, update.dtype, x.device).view(-1, *[1] * (x.dim() - 1))
        y = y.index_add(0, at, (of_rows * update).to(y.dtype))
    return y


def _one_op(layer: LoraAdapters, x: Tensor, rows: Rows, p: float) -> Tensor:
    mixtures = rows.only(layer.lora_A)
    if not any(mixtures):
        return layer.base_layer(x)
    weight, bias = layer.matrix, layer.base_layer.bias
    if len(mixtures) == 1 and len(mixtures[0]) == 1:
        ((name, of_row),) = mixtures[0]
        factors = layer.factors(name)
        factors = factors._replace(scaling=of_row * factors.scaling)
        return run(LoraLinear(autocast_input(x), weight, bias, *factors, None, p))
    factors_of = {name: layer.factors(name) for name in rows.adapters if name in layer.lora_A}
    own = {name: stacked(A0, B0, dA, dB, s, weight) for name, (A0, B0, dA, dB, s) in factors_of.items()}
    shared = {tuple(name for name, _ in mixture) for mixture in mixtures}
    if len(shared) == 1 < len(mixtures) and backends.select(x.device, "routed_lora_linear", dtype=x.dtype) is aten:
        return _scaled(x, weight, bias, [own[name] for name in shared.pop()], mixtures, rows, p)
    k, n = weight.shape[1], weight.shape[0]
    none = torch.zeros(0, k, device=x.device), torch.zeros(n, 0, device=x.device)
    As = [torch.cat([own[name][0] for name, _ in mixture] or [none[0]]) for mixture in mixtures]
    Bs = [torch.cat([of_row * own[name][1] for name, of_row in mixture] or [none[1]], dim=1) for mixture in mixtures]
    rank = max(A.shape[0] for A in As)
    A = torch.stack([pad(A.t(), (0, rank - A.shape[0])) for A in As])
    B = torch.stack([pad(B.t(), (0, 0, 0, rank - B.shape[1])) for B in Bs])
    return grouped_lora_linear(x, weight, bias, A, B, rows.groups(x), 1.0, dropout_p=p)


def _scaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: list[tuple[Tensor, Tensor]],
    mixtures: list[Mixture],
    rows: Rows,
    p: float,
) -> Tensor:
    """The layer on rows of the same adapters with other weights, composed of differentiable aten calls."""
    x = autocast_input(x)
    A, B = torch.cat([A for A, _ in factors]).to(x.dtype), torch.cat([B for _, B in factors], dim=1).to(x.dtype)
    ranks = [len(A) for A, _ in factors]
    of_rank = [[w for (_, w), rank in zip(mixture, ranks, strict=True) for _ in range(rank)] for mixture in mixtures]
    scale = upload(of_rank, x.dtype, x.device)[upload(rows.places, torch.int64, x.device)]
    activations = linear(aten.dropout(x, p, None), A).unflatten(0, (len(rows), -1)).flatten(1, -2)
    scaled = (activations * scale.unsqueeze(1)).view(*x.shape[:-1], -1)
    return linear(x, weight, bias) + linear(scaled, B)
