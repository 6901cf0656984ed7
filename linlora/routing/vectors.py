"""Makes task vectors the skills of a routed model: each request of a batch runs with its own vector, or mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import pad

from linlora.layers.calls import is_called_plainly
from linlora.layers.finding import check_unmerged
from linlora.layers.model_scope import leave_model_scope
from linlora.layers.peft_names import base_name
from linlora.layers.restoring import restoring
from linlora.routing.inventory import skill
from linlora.routing.model import RoutedModel
from linlora.routing.routed_layer import LayerSizes, check_linear
from linlora.routing.selectors import Selector, Sizes
from linlora.routing.structure import Inventory
from linlora.routing.variants import VARIANTS
from linlora.vectors.base_models import common_base
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector


class _Skills(NamedTuple):
    """The skills of one layer: A (r, K) and B (N, r) of each vector, around the point A0, B0 or without one."""

    scaling: float
    A0: Tensor | None
    B0: Tensor | None
    factors: list[tuple[Tensor, Tensor]]


def from_vectors(
    model: PeftModel, vectors: Sequence[TaskVector], variant: str = "private", **options: Any
) -> RoutedModel:
    """Serve, or route, n task vectors of one linearization point, or n plain adapters, from one model, in place.

    The inventory of every layer is the vectors' (dA, dB) around their point; the scope is theirs. Then

        routed(**batch, task_ids=ids)        example i runs with vector ids[i]
        routed(**batch, mixture=weights)     example i runs with Σ_s weights[i, s] · vector s, weights (examples, n)

    Linearized vectors mix exactly: a row is that of the model with the summed vector applied. So do plain adapters,
    read without the point their training started from, whatever their ranks, scalings and layers: a row is that of the
    model with Σ_s weights[i, s] ΔW_s merged, and an adapter of weight 0 has no part in it. Vectors of scope "lora" with
    a point mix A and B separately, as Poly does, so weights that sum to one give a LoRA adapter; vector.cast("weight")
    makes a plain adapter of one.

    Args:
        model: the PEFT model of the vectors; its own adapter is taken off and the PEFT model used up.
        vectors: TaskVectors of one point and scope.
        variant: of the selector. "private" routes by task id; "gate" weights the vectors per input (WEMoE), "table" and
            "poly" learn weights for n tasks.
        options: the selector's.

    Raises DifferentPointError for vectors of different points, ValueError for none, for a vector without its point, for
    layers the model lacks or has in another size, hooks on its LoRA layers, and another variant of plain adapters. An
    error leaves the model as it was.

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
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(sorted(VARIANTS))}")
    check_unmerged((base_name(name), m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    layers, scope = _layers(vectors)
    if scope is None:
        if variant != "private":
            raise ValueError(
                f"from_vectors: the factors of plain adapters trained apart do not add, as variant {variant!r} has it; "
                "serve them with variant='private', whose mixture= weights the adapters of every request, or read them "
                "with the adapter they started from: linlora.formats.read(adapter, point=start)"
            )
        options = {**options, "apart": True}
    for vector in vectors:
        vector.check_base(model)
    _check_model(model, layers)
    _check_calls(model)
    inventories: dict[str, Inventory] = {}
    selectors: dict[str, Selector] = {}
    for name, (scaling, _, _, factors) in layers.items():
        rank, inputs = factors[0][0].shape
        inventories[name] = Inventory(LayerSizes(len(vectors), 1, rank, scaling), name)
        selectors[name] = VARIANTS[variant](Sizes(len(vectors), len(vectors), 1, inputs), **options)
    with restoring(model):
        leave_model_scope(model)
        routed = RoutedModel(model.base_model.unload(), inventories, selectors)
        with torch.no_grad():
            for layer in routed.routed_layers:
                _, A0, B0, factors = layers[layer.layer_name]
                if A0 is not None:
                    layer.allocate_point("short" if B0 is None else "pair")
                As, Bs = zip(*(skill(A, B, 1) for A, B in factors), strict=True)
                values = ((layer.A0, A0), (layer.B0, B0), (layer.lora_A, torch.cat(As, 1)))
                for own, value in (*values, (layer.lora_B, torch.cat(Bs, 1))):
                    if own is not None and value is not None:
                        own.copy_(value)
        for parameter in routed.skills():
            parameter.requires_grad_(False)
        if scope == "model":
            routed.set_scope("model")
        return routed


def _layers(vectors: Sequence[TaskVector]) -> tuple[dict[str, _Skills], str | None]:
    """The skills of every layer by its name, and the scope of the vectors; None of plain adapters trained apart."""
    if not vectors:
        raise ValueError("from_vectors: no vectors were given")
    common_base(*(vector.base_model for vector in vectors))
    first = vectors[0]
    if all(vector.scope == "weight" or (vector.scope == "lora" and vector.point == {}) for vector in vectors):
        plain = [WeightVector.of(vector) for vector in vectors]
        for other in plain[1:]:
            plain[0].check_same_point(other)
        names = {name: None for vector in plain for name in vector.scalings}
        return {name: _apart(plain, name) for name in names}, None
    for vector in vectors[1:]:
        first.check_same_point(vector)
    point = next((v for v in vectors if v.point is not None), first).known_point("from_vectors")
    layers = {}
    for name, scaling in first.scalings.items():
        A0, B0 = point.get(f"{name}.A0"), point.get(f"{name}.B0")
        factors = [(v.deltas.get(f"{name}.dA"), v.deltas[f"{name}.dB"]) for v in vectors]
        if A0 is None:
            raise ValueError(f"from_vectors: the point of the vectors holds no factors of layer '{name}'")
        if first.scope == "lora":
            B = torch.zeros_like(factors[0][1]) if B0 is None else B0
            skills = [(A0 if dA is None else A0 + dA, B + dB) for dA, dB in factors]
            layers[name] = _Skills(scaling, None, None, skills)
        else:
            around = [(torch.zeros_like(A0) if dA is None else dA, dB) for dA, dB in factors]
            layers[name] = _Skills(scaling, A0, B0, around)
    return layers, first.scope


def _apart(vectors: Sequence[WeightVector], name: str) -> _Skills:
    """Adapters of any rank and scaling as skills of the largest rank and scaling 1; zeros of one without the layer."""
    updates = [vector.update(name) for vector in vectors if name in vector.scalings]
    own = [(update.A, update.B) for update in updates]
    A, B = own[0]
    for other_A, other_B in own[1:]:
        if other_A.shape[1:] != A.shape[1:] or other_B.shape[0] != B.shape[0]:
            sizes = f"{A.shape[1]} -> {B.shape[0]} and {other_A.shape[1]} -> {other_B.shape[0]}"
            raise ValueError(f"from_vectors: layer '{name}' is {sizes} in the adapters; they are of different models")
    rank, given = max(A.shape[0] for A, _ in own), iter(own)
    factors = [next(given) if name in v.scalings else (A.new_zeros(A.shape), B.new_zeros(B.shape)) for v in vectors]
    return _Skills(
        1.0, None, None, [(pad(A, (0, 0, 0, rank - A.shape[0])), pad(B, (0, rank - B.shape[1]))) for A, B in factors]
    )


def _check_calls(model: PeftModel) -> None:
    """Raise a ValueError for hooks and forwards that would be lost with the LoRA layers that are taken off."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            parts = layer.named_modules(prefix=name)
            taken = [(key, part) for key, part in parts if not key.startswith(f"{name}.base_layer")]
            found += [key for key, part in taken if not is_called_plainly(part)]
    if found:
        raise ValueError(
            f"from_vectors: '{found[0].removeprefix('base_model.model.')}' has hooks or a forward of its own, which "
            "would be lost with the LoRA layer that is taken off; remove it, and put it on the routed layer afterwards"
        )


def _check_model(model: PeftModel, layers: dict[str, _Skills]) -> None:
    """Raise a ValueError unless the model has the layers, as linear layers of their sizes."""
    modules = dict(model.get_base_model().named_modules())
    for name, skills in layers.items():
        if name not in modules:
            raise ValueError(f"from_vectors: the vectors are of a layer '{name}', which the model does not have")
        module = modules[name]
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        n, k = check_linear(name, base)
        A, B = skills.factors[0]
        if (B.shape[0], A.shape[1]) != (n, k):
            raise ValueError(
                f"from_vectors: layer '{name}' is {A.shape[1]} -> {B.shape[0]} in the vectors and {k} -> {n} in the "
                "model; pass the model they were trained on"
            )
