"""Task vectors as the skills of a routed model: every request of a batch with its own vector, or mixture of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from linlora.model_scope import leave_model_scope
from linlora.modules import fused_layers
from linlora.routing.inventory import skill
from linlora.routing.layers import LayerSizes
from linlora.routing.model import Inventory, RoutedModel
from linlora.routing.selectors import Selector, Sizes
from linlora.routing.variants import VARIANTS
from linlora.task_vector import TaskVector


def from_vectors(
    model: PeftModel, vectors: Sequence[TaskVector], variant: str = "private", **options: Any
) -> RoutedModel:
    """Serve, or route, n task vectors of one linearization point from one model, in place.

    The inventory of every layer is the vectors' (dA, dB) around their point; the scope is theirs. Then

        routed(**batch, task_ids=ids)        example i runs with vector ids[i]
        routed(**batch, mixture=weights)     example i runs with Σ_s weights[i, s] · vector s, weights (examples, n)

    Linearized vectors mix exactly: a row is what the model with the summed vector applied computes. Of vectors of scope
    "lora" the factors A and B are mixed separately, as in Poly, so that weights that sum to one give a LoRA adapter.

    Args:
        model: the PEFT model the vectors are of; its own adapter is taken off and the PEFT model used up.
        vectors: TaskVectors of one point and scope.
        variant: of the selector that routes by task id, "private", or that decides by itself: "gate" weights the
            vectors per input (WEMoE), "table" and "poly" learn weights for n tasks.
        options: the selector's.

    Raises DifferentPointError for vectors of different points, ValueError for none, for a vector without its point and
    for layers the model lacks.

    >>> import torch, linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model)
    >>> vector = linlora.TaskVector.from_model(model)
    >>> routed = from_vectors(model, [vector, 2.0 * vector])
    >>> routed(**batch, mixture=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])).logits.shape
    torch.Size([3, 3])
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"from_vectors takes the PeftModel the vectors are of, got {type(model).__name__}")
    if not vectors:
        raise ValueError("from_vectors: no vectors were given")
    first = vectors[0]
    for vector in vectors[1:]:
        first.check_same_point(vector)
    point = next((vector.point for vector in vectors if vector.point is not None), None)
    if point is None:
        raise ValueError("from_vectors: the vectors were saved without their point (include_point=False)")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(sorted(VARIANTS))}")
    for name, fused in fused_layers(model):
        if fused.merged_adapters:
            raise ValueError(f"layer '{name}': {fused.merged_adapters} are merged; call model.unmerge_adapter()")
    leave_model_scope(model)
    base = model.base_model.unload()
    modules = dict(base.named_modules())
    missing = [name for name in first.scalings if name not in modules]
    if missing:
        raise ValueError(f"from_vectors: the vectors are of a layer '{missing[0]}', which the model does not have")
    inventories: dict[str, Inventory] = {}
    selectors: dict[str, Selector] = {}
    for name, scaling in first.scalings.items():
        rank, inputs = point[f"{name}.A0"].shape
        inventories[name] = Inventory(LayerSizes(len(vectors), 1, rank, scaling), name)
        selectors[name] = VARIANTS[variant](Sizes(len(vectors), len(vectors), 1, inputs), **options)
    routed = RoutedModel(base, inventories, selectors)
    for layer in routed.routed_layers:
        name = layer.layer_name
        A0, B0 = point[f"{name}.A0"], point.get(f"{name}.B0")
        if first.scope == "lora":
            assert B0 is not None
            skills = [skill(A0 + v.deltas[f"{name}.dA"], B0 + v.deltas[f"{name}.dB"], 1) for v in vectors]
        else:
            layer.allocate_point("short" if B0 is None else "pair")
            dAs = [v.deltas.get(f"{name}.dA", torch.zeros_like(A0)) for v in vectors]
            skills = [skill(dA, v.deltas[f"{name}.dB"], 1) for dA, v in zip(dAs, vectors, strict=True)]
            for own, value in ((layer.A0, A0), (layer.B0, B0)):
                if own is not None and value is not None:
                    own.copy_(value)
        As, Bs = zip(*skills, strict=True)
        with torch.no_grad():
            if layer.lora_A is not None:
                layer.lora_A.copy_(torch.cat(As, 1))
            layer.lora_B.copy_(torch.cat(Bs, 1))
    for parameter in routed.skills():
        parameter.requires_grad_(False)
    if first.scope == "model":
        routed.set_scope("model")
    return routed
