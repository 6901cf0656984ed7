"""RegMean: the weights whose layers give, on the inputs each task saw, most nearly what that task's layer gave.

    argmin over ΔW of Σₜ E ‖(ΔW − ΔWₜ) xₜ‖² = (Σₜ ΔWₜ Gₜ) (Σₜ Gₜ)⁻¹        Gₜ = E xₜ xₜᵀ        (arXiv 2212.09849)

ΔWₜ Gₜ is sₜ Bₜ (Aₜ Gₜ), so the result has factors [s₁ B₁ …] and [A₁ G₁; …] (Σ G)⁻¹: exact, of the rank of all adapters.
Three forms: G (K, K); its diagonal, K numbers, which weights every input by itself; and, for linearized adapters of one
point at B0 = 0, whose ΔWₜ = s dBₜ A0 differ in dB alone, Z = A0 G A0ᵀ (r, r): the best among the s B A0.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linlora.fusion.checks import check_number, checked
from linlora.fusion.inference import Logits, main_logits
from linlora.fusion.layerwise import Layer, fused_layers, peek, weight_vectors
from linlora.fusion.tensorwise import rounded, without_values
from linlora.fusion.truncation import OutRank
from linlora.layers.temporary import evaluating
from linlora.layers.weights import Update
from linlora.storage.tensors import memory
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector

PUBLISHED_SHRINK = 0.95
Inputs = Mapping[str, Tensor]


def regmean(
    vectors: Iterable[TaskVector],
    inputs: Sequence[Inputs],
    shrink: float = PUBLISHED_SHRINK,
    scaling: float = 1.0,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """λ (Σₜ ΔWₜ Gₜ)(Σₜ Gₜ)⁻¹ of vectors in weight space, or of scope "layer" and one point at B0 = 0.

    Args:
        inputs: for each vector what its model's layers see, `input_moments`: of every layer that any vector changes G
            (K, K) or its diagonal (K,); at scope "layer" also Z (r, r). A vector that lacks a layer is zero there.
        shrink: what the entries of G beside the diagonal are multiplied by; 0.95 as published for CLIP, 0.6 for GPT-2.
        scaling: λ; 1 as published.
        out_rank, energy: in weight space, cut the rank of the result.

    Raises ValueError for moments that are missing, of another size, or that leave the solution open.

    >>> A, G = torch.eye(2), torch.diag(torch.tensor([3.0, 1.0]))
    >>> one, two = (WeightVector({"q.dA": A, "q.dB": B * A}, {}, "", {"q": 1.0}, "weight") for B in (4.0, 0.0))
    >>> fused = regmean([one, two], [{"q": G}, {"q": torch.eye(2)}])
    >>> (fused.deltas["q.dB"] @ fused.deltas["q.dA"]).tolist()
    [[3.0, 0.0], [0.0, 2.0]]
    """
    check_number("regmean", "shrink", shrink)
    check_number("regmean", "scaling", scaling)
    if not 0.0 <= shrink <= 1.0:
        raise ValueError(f"regmean: shrink is at least 0 and at most 1, got {shrink}")
    kind, vectors = peek(vectors)
    if kind is WeightVector:
        in_weights = weight_vectors(vectors)
        _check_count(in_weights, inputs)

        def merge(layer: Layer) -> Update:
            return _weighted(layer, [_moments(task, layer.name, i) for i, task in enumerate(inputs)], shrink, scaling)

        return fused_layers(in_weights, merge, out_rank=out_rank, energy=energy)
    return _of_one_point(list(checked(vectors)), inputs, shrink, scaling)


def input_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Iterable[str],
    diagonal: bool = False,
    logits: Logits = main_logits,
) -> dict[str, Tensor]:
    """E x xᵀ of the inputs x of some layers of a model, (K, K), or the diagonal of it, (K,), float32, by layer.

    Positions that the batch's `attention_mask` pads are left out of every layer whose input has the mask's shape.

    Args:
        model: with the adapter of the task in it, as it was trained; a PeftModel or a merged one.
        batches: unlabeled; 256 examples as published.
        layers: names as in a vector, e.g. those of `vector.scalings`.
        logits: how the model is called with a batch; `model(**batch)` if not given. The `attention_mask` is that of
            the batch, or of its "inputs".

    >>> from linlora.testing import tiny_batch, tiny_model
    >>> moments = input_moments(tiny_model("bert"), [tiny_batch("bert")], ["bert.pooler.dense"])
    >>> moments["bert.pooler.dense"].shape
    torch.Size([32, 32])
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    if missing := [name for name in counts if name not in modules]:
        raise ValueError(f"input_moments: the model has no layer '{missing[0]}'")
    mask: Tensor | None = None

    def see(name: str, x: Tensor) -> None:
        rows = x.detach()[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.detach()
        rows = rows.reshape(-1, x.shape[-1]).float()
        found = rows.square().sum(0) if diagonal else rows.T @ rows
        sums[name] = sums[name] + found if name in sums else found
        counts[name] += len(rows)

    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name in counts
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                mask = batch.get("inputs", batch).get("attention_mask")
                logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name, count in counts.items() if not count]:
        raise ValueError(f"input_moments: no input reached layer '{unseen[0]}'")
    return {name: (sums[name] / count).cpu() for name, count in counts.items()}


def _weighted(layer: Layer, moments: Sequence[Tensor], shrink: float, scaling: float) -> Update:
    """The factors of one layer in weight space."""
    size = layer.updates[0].A.shape[1]
    for moment in moments:
        if moment.shape not in ((size, size), (size,)) or moment.dim() != moments[0].dim():
            raise ValueError(
                f"regmean: layer '{layer.name}' has {size} inputs, and moments ({size}, {size}), or ({size},) of all "
                f"vectors, are expected, got {tuple(moment.shape)}"
            )
    total = torch.zeros((), dtype=torch.float64)
    for moment in sorted(moments, key=_bits):  # one at a time: K×K is as large as the weight
        total = total + _shrunk(moment, shrink)
    rows = [_times(update.A.double(), _shrunk(moments[i], shrink))
            for i, update in zip(layer.indices, layer.updates, strict=True)]  # fmt: skip
    A = _solved(torch.cat(rows), total, layer.name)
    return Update(A, scaling * torch.cat([update.B.double() for update in layer.updates], dim=1))


def _of_one_point(vectors: Sequence[TaskVector], inputs: Sequence[Inputs], shrink: float, scaling: float) -> TaskVector:
    first = without_values(vectors)
    _check_count(vectors, inputs)
    if first.scope != "layer" or first.point is None or any(name.endswith(".dA") for name in first.deltas):
        raise ValueError(
            "regmean: of linearized adapters those of scope 'layer' that start at B0 = 0 are averaged in dB; others as "
            "what they add to the weights: vector.cast('weight')"
        )
    deltas = {}
    for layer in first.scalings:
        A0 = first.point[f"{layer}.A0"].double()
        moments = []
        for i, task in enumerate(inputs):
            moment = _moments(task, layer, i)
            if moment.shape == (len(A0), len(A0)) and len(A0) != A0.shape[1]:
                moments.append(moment.double())
            elif moment.shape in ((A0.shape[1],), (A0.shape[1], A0.shape[1])):
                moments.append(_times(A0, _shrunk(moment, shrink)) @ A0.T)
            else:
                raise ValueError(
                    f"regmean: layer '{layer}' has {A0.shape[1]} inputs and rank {len(A0)}, which moments of shape "
                    f"{tuple(moment.shape)} fit in no form"
                )
        tops = [vector.deltas[f"{layer}.dB"].double() @ Z for vector, Z in zip(vectors, moments, strict=True)]
        top, total = (torch.stack(sorted(parts, key=_bits)).sum(0) for parts in (tops, moments))
        name = f"{layer}.dB"
        deltas[name] = rounded(scaling * _solved(top, total, layer), first.deltas[name].dtype, name)
    return replace(first, deltas=deltas)


def _bits(moment: Tensor) -> int:
    """A key by which the order of the tasks changes no bit of a sum."""
    return zlib.crc32(memory(moment.contiguous()))


def _shrunk(moment: Tensor, shrink: float) -> Tensor:
    """G with the entries beside the diagonal drawn to zero, float64."""
    moment = moment.double()
    return moment if moment.dim() == 1 else shrink * moment + (1 - shrink) * torch.diag(moment.diagonal())


def _times(rows: Tensor, moment: Tensor) -> Tensor:
    return rows * moment if moment.dim() == 1 else rows @ moment


def _solved(rows: Tensor, total: Tensor, layer: str) -> Tensor:
    """rows · total⁻¹; an input that is always zero stays without weight."""
    if total.dim() == 1:
        return torch.where(total > 0, rows / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    never = total.diagonal() <= 0
    scale = total.diagonal().clamp(min=0.0).sqrt().masked_fill(never, 1.0)
    scaled = total / scale / scale[:, None]
    scaled.diagonal()[never] = 1.0
    lower, info = torch.linalg.cholesky_ex(scaled)
    if int(info) or float(lower.diagonal().min()) < 1e-6:
        raise ValueError(
            f"regmean: the inputs of layer '{layer}' do not span its input space, which leaves the solution open; use "
            "more examples, shrink below 1, or the diagonal"
        )
    return torch.cholesky_solve((rows / scale).T, lower).T / scale


def _moments(task: Inputs, layer: str, index: int) -> Tensor:
    if layer not in task:
        raise ValueError(f"regmean: the inputs of vector {index + 1} have no moments of layer '{layer}'")
    if not bool(torch.isfinite(task[layer]).all()):
        raise ValueError(f"regmean: the moments of layer '{layer}' of vector {index + 1} hold NaN or infinity")
    return task[layer]


def _check_count(vectors: Sequence[TaskVector], inputs: Sequence[Inputs]) -> None:
    if len(inputs) != len(vectors):
        raise ValueError(f"regmean: inputs of {len(inputs)} tasks for {len(vectors)} vectors; pass one each")
