"""Weight space: vectors of what adapters add to the weights of their base model, ΔW = s B A, kept as factors.

They are relative to the base weights, not to a starting point. So adapters of any start, rank, scaling and choice of
layers add; a layer that one of them lacks is zero there. N×K matrices are never formed:

    sum        [s₁ B₁, s₂ B₂] [A₁; A₂]                          the ranks add up
    multiple   another s
    product    ⟨ΔW₁, ΔW₂⟩ = s₁ s₂ Σ (B₁ᵀ B₂) ⊙ (A₁ A₂ᵀ)         in float64
    norm       s ‖R_B R_Aᵀ‖ of QR factors of B and Aᵀ           in float64: a product loses that of a small difference
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from linlora.layers.vanilla import refuse_changed_base
from linlora.layers.weights import Update
from linlora.storage.tensors import StoredTensors, holding, shapes, wide
from linlora.vectors.adapters import assign, check_values, layers_to_change, state_of
from linlora.vectors.base_models import common_base
from linlora.vectors.factors import Size, factors_of, size_of, stored_factors, total
from linlora.vectors.points import DifferentPointError, point_hash
from linlora.vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, eq=False, repr=False)
class WeightVector(TaskVector, scope="weight"):
    """The change of the weights by an adapter: ΔW = s B A, with A '<layer>.dA' (R, K) and B '<layer>.dB' (N, R).

    `linlora.formats.read` of a plain adapter gives one, and `cast("weight")` of a vector of scope "layer" or "lora" at
    any starting point. There is no point, and `scalings` holds each s.

    Attributes:
        truncation_error: the part of the norm that was lost when the vector was cut to this rank; 0 where none was.

    >>> import linlora
    >>> linlora.testing.tiny_model("bert", trained=True, r=2).save_pretrained("two")
    >>> linlora.testing.tiny_model("bert", trained=True, r=8, target_modules=["query"]).save_pretrained("eight")
    >>> two, eight = linlora.formats.read("two"), linlora.formats.read("eight")
    >>> difference = two - 0.5 * eight
    >>> difference.scope, len(difference.scalings), {size.rank for size in difference.sizes().values()}
    ('weight', 11, {2, 10})
    """

    truncation_error: float = 0.0

    @classmethod
    def of(cls, vector: TaskVector) -> WeightVector:
        """The change of the base weights by a vector, its point's part included: the same function.

        Raises ValueError for scope "model", whose function is no change of weights, for a vector without its point, and
        for one of base weights that its start changed.
        """
        if isinstance(vector, WeightVector):
            return vector
        if vector.scope == "model":
            raise ValueError(
                "cast: a network linearized as a whole (scope 'model') computes f(φ0) + J δ, which is no change of its "
                "weights; it fuses with vectors of its own point only. vector.cast('layer') is another function, and "
                "has one"
            )
        refuse_changed_base(vector.changed_base, "cast: the vector")
        point = vector.known_point("cast")
        if vector.scope == "lora" and not point:
            return weight_vector(vector, vector.deltas, vector.scalings)
        sizes = {layer: size_of(vector, layer) for layer in vector.scalings}
        factors = stored_factors(sizes, lambda layer: factors_of(vector, layer))
        deltas = factors if isinstance(vector.deltas, StoredTensors) else dict(factors)
        return weight_vector(vector, deltas, vector.scalings)

    def sizes(self) -> dict[str, Size]:
        """(N, K), rank and dtype of every layer; the rank of ΔW may be smaller than that of its factors."""
        like, found = shapes(self.deltas), {}
        for layer in self.scalings:
            A, B = like[f"{layer}.dA"], like[f"{layer}.dB"]
            found[layer] = Size(B.shape[0], A.shape[1], A.shape[0], holding(A.dtype, B.dtype))
        return found

    def update(self, layer: str, weight: float = 1.0) -> Update:
        """ΔW of a layer, times a weight, in float32 or wider."""
        A, B = self.deltas[f"{layer}.dA"], self.deltas[f"{layer}.dB"]
        dtype = wide(A.dtype, B.dtype)
        return Update(A.to(dtype), weight * self.scalings[layer] * B.to(dtype))

    def __add__(self, other: TaskVector) -> WeightVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        self.check_same_point(other)
        assert isinstance(other, WeightVector)
        deltas: dict[str, Tensor] = {}
        scalings = {}
        for layer in [*self.scalings, *(layer for layer in other.scalings if layer not in self.scalings)]:
            there = [vector for vector in (self, other) if layer in vector.scalings]
            if len(there) == 1:
                A, B = (there[0].deltas[f"{layer}.{kind}"] for kind in ("dA", "dB"))
                scalings[layer] = there[0].scalings[layer]
            else:
                update, scalings[layer] = total([vector.update(layer) for vector in there]), 1.0
                A, B = update.A, update.B
            deltas[f"{layer}.dA"], deltas[f"{layer}.dB"] = A, B
        return weight_vector(self, deltas, scalings, common_base(self.base_model, other.base_model))

    def __sub__(self, other: TaskVector) -> WeightVector:
        return self + -1.0 * other if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: float) -> WeightVector:
        factor = float(factor)
        return replace(self, scalings={layer: scaling * factor for layer, scaling in self.scalings.items()})

    __rmul__ = __mul__

    def own_metadata(self) -> dict[str, str]:
        return {"truncation_error": repr(self.truncation_error)} if self.truncation_error else {}

    def with_metadata(self, metadata: Mapping[str, str]) -> WeightVector:
        try:
            return replace(self, truncation_error=float(metadata.get("truncation_error", 0.0)))
        except ValueError:
            return self

    def dot(self, other: TaskVector) -> float:
        """⟨self, other⟩ = Σ tr ΔWᵀ ΔW' over the layers of both, in float64."""
        self.check_same_point(other)
        assert isinstance(other, WeightVector)
        both = [layer for layer in self.scalings if layer in other.scalings]
        return sum(_product(self.update(layer), other.update(layer)) for layer in both)

    def norm(self) -> float:
        """The Euclidean norm of all ΔW, in float64."""
        return sum(self.update(layer).norm() ** 2 for layer in self.scalings) ** 0.5

    def cast(self, scope: str) -> TaskVector:
        """The vector itself for "weight". It has no starting point, so it is in no tangent space."""
        if scope == "weight":
            return self
        raise ValueError(
            f"cast: to scope '{scope}': the vector starts from zero weights, and has no point to linearize at; a plain "
            "adapter has to be read with the adapter its training started from: linlora.formats.read(folder, "
            "point=start)"
        )

    def move_point(self, model: PeftModel) -> None:
        raise ValueError(
            "the vector is in weight space and has no linearization point, so no model can be put at it; load the "
            "adapter into the model with PEFT, and linearize there"
        )

    def check_same_point(self, other: TaskVector) -> None:
        """Raise a DifferentPointError unless both are in weight space and of one base model."""
        self.check_same_scope(other)
        assert isinstance(other, WeightVector)
        common_base(self.base_model, other.base_model)
        mine, others = self.sizes(), other.sizes()
        for layer in mine:
            if layer in others and mine[layer][:2] != others[layer][:2]:
                (n, k), (m, j) = mine[layer][:2], others[layer][:2]
                raise DifferentPointError(
                    f"layer '{layer}' is {k} -> {n} in one of the adapters and {j} -> {m} in the other: they are of "
                    "different base models"
                )

    def put_into(self, model: PeftModel, adapter: str) -> None:
        """Let a plain adapter add ΔW to the weights: in the first rows of A, the others zero. See `linlora.apply`."""
        layers = dict(layers_to_change(model, adapter))
        if missing := [layer for layer in self.scalings if layer not in layers]:
            raise DifferentPointError(
                f"the vector changes layer '{missing[0]}', which adapter '{adapter}' does not: an adapter whose "
                "target_modules cover it is needed, or linlora.export(vector, folder) and PEFT's load_adapter"
            )
        values = {}
        for name, layer in layers.items():
            if state_of(layer, adapter) != "plain":
                raise DifferentPointError(
                    f"adapter '{adapter}' is linearized, and a vector of scope 'weight' goes into a plain one; "
                    "linlora.delinearize(model) makes it that"
                )
            values[name] = _padded(self, name, layer, adapter) if name in self.scalings else None
        check_values({name: factor for name, pair in values.items() for factor in pair or ()})
        for name, layer in layers.items():
            if (pair := values[name]) is not None:
                assign(layer.lora_A[adapter].weight, pair[0], f"{name}.dA")
            assign(layer.lora_B[adapter].weight, 0.0 if pair is None else pair[1], f"{name}.dB")


def weight_vector(
    like: TaskVector, deltas: Mapping[str, Tensor], scalings: Mapping[str, float], base_model: str | None = None
) -> WeightVector:
    """The vector of some factors, of the base model of another vector if none is named."""
    return WeightVector(deltas, {}, point_hash({}), dict(scalings), "weight", base_model or like.base_model)


def _product(left: Update, right: Update) -> float:
    """⟨ΔW, ΔW'⟩ from the factors."""
    A, B, C, D = (factor.double() for factor in (left.A, left.B, right.A, right.B))
    return float(((B.T @ D) * (A @ C.T)).sum())


def _padded(vector: WeightVector, name: str, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of a layer of a vector, in the rank and for the scaling that a layer of a model has."""
    A, B = factors_of(vector, name)
    rank, inputs = layer.lora_A[adapter].weight.shape
    outputs, scaling = layer.lora_B[adapter].weight.shape[0], float(layer.scaling[adapter])
    if (len(B), A.shape[1]) != (outputs, inputs):
        raise DifferentPointError(
            f"layer '{name}' is {A.shape[1]} -> {len(B)} in the vector and {inputs} -> {outputs} in the model: not the "
            "base model the vector is of"
        )
    if len(A) > rank or scaling == 0.0:
        raise ValueError(
            f"layer '{name}' has rank {len(A)} in the vector, and adapter '{adapter}' has rank {rank} and scaling "
            f"{scaling:g}; an adapter of rank {len(A)} or more is needed, or linlora.export(vector, folder) and PEFT's "
            "load_adapter"
        )
    return pad(A, (0, 0, 0, rank - len(A))), pad(B * (vector.scalings[name] / scaling), (0, rank - len(A)))
