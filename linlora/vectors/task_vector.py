"""Task vectors: the change (dA, dB) of every layer by training, together with the point it started from.

Vectors of one linearization point form a vector space: add, subtract, scale, take norms and cosines. To mix vectors of
different points is an error; as changes of the weights they mix (linlora.vectors.weight_vector).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from linlora.layers.restoring import restoring
from linlora.layers.vanilla import changed_base
from linlora.storage.tensors import shapes
from linlora.vectors.adapters import assign, check_values, delta_parameters, held_by, layers_to_change, one_adapter
from linlora.vectors.base_models import common_base
from linlora.vectors.files import Content, read_vector, write_vector
from linlora.vectors.points import DifferentPointError, point_hash, point_name, some

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, eq=False, repr=False)
class TaskVector:
    """The change of one adapter from its linearization point.

    Attributes:
        deltas: '<layer>.dA' (r, K) and '<layer>.dB' (N, r); linearized, no dA where B0 = 0: it has no effect there.
        point: '<layer>.A0' and '<layer>.B0', absent where zero; None if the vector was saved with the hash alone.
        point_hash: SHA-256 of the point's values.
        scalings: the LoRA scaling of each layer.
        scope: "layer" or "model" for a linearized adapter, "lora" for a plain one, "weight" for a `WeightVector`.
        base_model: the id of the base model, where PEFT knows it.
        changed_base: the initialization (PiSSA and its kin) that took the adapter's start out of the base weights. The
            vector is then of the changed weights: it goes into models that were started so, and into no weights.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> vector = linlora.TaskVector.from_model(model)
    >>> (0.5 * vector + vector).norm()
    0.0
    """

    deltas: Mapping[str, Tensor]
    point: Mapping[str, Tensor] | None
    point_hash: str
    scalings: dict[str, float]
    scope: str
    base_model: str | None = None
    changed_base: str | None = None
    _spaces: ClassVar[dict[str, Any]] = {}

    def __repr__(self) -> str:
        """One line.

        >>> TaskVector({"q.dB": torch.ones(4, 2)}, None, "", {"q": 1.0}, "layer", "bert-base")
        TaskVector(scope='layer', 1 layer, rank 2, 8 values, base_model='bert-base')
        """
        like = shapes(self.deltas)
        ranks = sorted({delta.shape[-1] for name, delta in like.items() if name.endswith(".dB")})
        layers = f"{len(self.scalings)} layer{'s' * (len(self.scalings) != 1)}"
        rank = " to ".join(str(rank) for rank in ranks[:: max(1, len(ranks) - 1)])
        values = sum(delta.numel() for delta in like.values())
        return (
            f"{type(self).__name__}(scope={self.scope!r}, {layers}, rank {rank}, {values:,} values, "
            f"base_model={self.base_model!r})"
        )

    def __init_subclass__(cls, scope: str) -> None:
        """Make the class that of vectors of a scope."""
        TaskVector._spaces[scope] = cls

    @classmethod
    def from_model(cls, model: PeftModel, adapter: str | None = None, point: TaskVector | None = None) -> TaskVector:
        """Read the vector of an adapter (the active one if not named), copied to the CPU.

        A plain LoRA adapter has no linearization point of its own: pass as `point` the vector read before training
        (without one, its current values are the point and the vector is zero).

        Raises ValueError for an adapter that is more than A and B of linear layers.
        """
        adapter = one_adapter(model, adapter)
        if point is not None and point.scope == "weight":
            raise ValueError("from_model: a vector in weight space is no point; pass TaskVector.from_model(start)")
        held = held_by(model, adapter, None if point is None else point.point)
        base_model = getattr(model.peft_config[adapter], "base_model_name_or_path", None)
        changed = changed_base(model.peft_config.values())
        at = point_hash(held.point)
        vector = cls(held.deltas, held.point, at, held.scalings, held.scope, base_model, changed)
        if point is not None and point.point != {}:
            # a point has no scalings of its own, and whether the model is its base is for whoever has both to say
            vector.check_same_point(replace(point, scalings=held.scalings, base_model=None))
        return vector

    def save(self, path: str | os.PathLike, include_point: bool = True) -> None:
        """Write a safetensors file; a killed save leaves the previous file whole.

        With `include_point=False` the point is stored as its hash only: smaller, and usable with a model that is at
        that point already.
        """
        content = self.content()
        write_vector(path, content if include_point else content._replace(point=None))

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskVector:
        """Read a file of `save`; truncated, foreign, altered and NaN-carrying ones are refused by name."""
        return cls.open(path).loaded()

    @classmethod
    def open(cls, path: str | os.PathLike) -> TaskVector:
        """The vector that `load` reads, left in its file: a tensor is read, and checked, whenever it is asked for.

        `linlora.fuse` of such vectors gives another one; to save that streams through the files.

        >>> import linlora
        >>> model = linlora.testing.tiny_model("bert")
        >>> _ = linlora.linearize(model)
        >>> TaskVector.from_model(model).save("vector.safetensors")
        >>> linlora.fuse([TaskVector.open("vector.safetensors")] * 8, "ties").save("fused.safetensors")
        """
        content = read_vector(path)
        space: Any = cls._spaces[content.scope] if content.scope == "weight" else cls
        return space(*content[:-1]).with_metadata(content.metadata)

    def content(self) -> Content:
        """The fields of the vector, as a file holds them."""
        return Content(
            self.deltas, self.point, self.point_hash, self.scalings, self.scope, self.base_model, self.changed_base,
            self.own_metadata(),
        )  # fmt: skip

    def own_metadata(self) -> dict[str, str]:
        """Entries of a file's metadata that this class of vectors alone has."""
        return {}

    def with_metadata(self, metadata: Mapping[str, str]) -> TaskVector:
        """The vector with those entries of a file's metadata."""
        return self

    def loaded(self) -> TaskVector:
        """The vector in memory: one that lies in files is read, or computed, whole."""
        return replace(self, deltas=dict(self.deltas), point=None if self.point is None else dict(self.point))

    def known_point(self, action: str) -> Mapping[str, Tensor]:
        """The point. Raises ValueError, by the name of what needs it, for a vector that was saved without."""
        if self.point is None:
            raise ValueError(
                f"{action}: the vector was saved without its point (include_point=False), and ΔW is of both; use the "
                "vector with its point"
            )
        return self.point

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.add)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.sub)

    def __mul__(self, factor: float) -> TaskVector:
        self._check_displacement()
        return replace(self, deltas={name: delta * factor for name, delta in self.deltas.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1.0 / divisor)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __radd__(self, other: Any) -> TaskVector:  # so that sum(vectors) works
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def cast(self, scope: str) -> TaskVector:
        """The vector at another scope.

        To "layer" or "model": the same displacement from the same point, another function. A vector of plain LoRA
        training (scope "lora") becomes one of the tangent space at its start: post-hoc linearization,
        `f(φ0) + J (φ - φ0)`. Where B0 = 0 its dA has no effect there and is dropped.

        To "weight": the same function, as the ΔW it adds to the base weights (`WeightVector`), its point's included.
        """
        if scope == "weight":
            return self._spaces[scope].of(self)
        if scope not in ("layer", "model"):
            raise ValueError(f"cast: unknown scope {scope!r}; choose 'layer', 'model' or 'weight'")
        if self.scope != "lora":
            return replace(self, scope=scope)
        point = self.known_point("cast")
        if not point:
            raise ValueError(
                "cast: the vector starts from zero, where A0 = B0 = 0 and the tangent space is empty; a plain adapter "
                "has to be read with the adapter its training started from: linlora.formats.read(folder, point=start)"
            )
        zero = [name for name in self.scalings if f"{name}.B0" not in point or not point[f"{name}.B0"].any()]
        without = {f"{name}.B0" for name in zero} | {f"{name}.dA" for name in zero}
        point = {name: tensor for name, tensor in point.items() if name not in without}
        deltas = {name: tensor for name, tensor in self.deltas.items() if name not in without}
        return replace(self, deltas=deltas, point=point, point_hash=point_hash(point), scope=scope)

    def dot(self, other: TaskVector) -> float:
        """⟨self, other⟩ over all dA and dB, accumulated in float64."""
        self.check_same_point(other)
        return float(sum((self.deltas[n].double() * other.deltas[n].double()).sum() for n in self.deltas))

    def norm(self) -> float:
        """The Euclidean norm over all dA and dB."""
        return self.dot(self) ** 0.5

    def cosine(self, other: TaskVector) -> float:
        """The cosine of the angle between two vectors; 0 if one of them is zero."""
        norms = self.norm() * other.norm()
        return self.dot(other) / norms if norms else 0.0

    def move_point(self, model: PeftModel) -> None:
        """Put the active adapter of a PEFT model, not linearized yet, at this vector's linearization point."""
        point, adapter = self.known_point("move_point"), one_adapter(model, None)
        check_values(point)
        with restoring(model):
            for name, layer in self._matching_layers(model, adapter):
                assign(layer.lora_A[adapter].weight, point.get(f"{name}.A0", 0.0), f"{name}.A0")
                assign(layer.lora_B[adapter].weight, point.get(f"{name}.B0", 0.0), f"{name}.B0")

    def _combine(self, other: TaskVector, operation: Callable[[Tensor, Tensor], Tensor]) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        self.check_same_point(other)
        deltas = {name: operation(delta, other.deltas[name]) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas, base_model=common_base(self.base_model, other.base_model))

    def check_same_point(self, other: TaskVector) -> None:
        """Raise a DifferentPointError unless the vectors have one scope, base, layers, scalings and point: they add."""
        self._check_displacement()
        self.check_same_scope(other)
        common_base(self.base_model, other.base_model)
        self.check_same_layers(other)
        for name, scaling in self.scalings.items():
            if not math.isclose(scaling, other.scalings[name], rel_tol=1e-6):
                raise DifferentPointError(
                    f"the LoRA scaling of layer '{name}' is {scaling:g} in one of the vectors and "
                    f"{other.scalings[name]:g} in the other; train every task with one lora_alpha, r and use_rslora"
                )
        if self.point_hash != other.point_hash:
            where = ""
            if self.point is not None and other.point is not None:
                both = self.point.keys() & other.point.keys()
                odd = sorted(n for n in both if not torch.equal(self.point[n], other.point[n]))
                where = f"; they differ in {some(odd)}" if odd else ""
            raise DifferentPointError(
                "the vectors start from different linearization points and live in different tangent spaces" + where +
                ". Train every task from one adapter: linearize(model, point=first_vector)"
            )  # fmt: skip

    def check_same_scope(self, other: TaskVector) -> None:
        """Raise a DifferentPointError for vectors of two scopes."""
        if self.scope == other.scope:
            return
        remedy = (
            "one of scope 'model' adds only to its like; another function, of scope 'layer', is that of "
            "vector.cast('layer'), or linlora export --cast layer"
            if "model" in (self.scope, other.scope)
            else "what they add to the weights does: vector.cast('weight'), or --scope weight"
        )
        raise DifferentPointError(
            f"a vector of scope '{self.scope}' and one of scope '{other.scope}' do not add; {remedy}"
        )

    @property
    def _is_plain_without_start(self) -> bool:
        return self.scope == "lora" and self.point_hash == point_hash({})

    def _check_displacement(self) -> None:
        """Raise a DifferentPointError for a plain adapter without its start, which is A and B themselves."""
        if self._is_plain_without_start:
            raise DifferentPointError(
                "the vector is a plain adapter without its start, A and B themselves. They do not add, nor scale: what "
                "the adapter adds is their product, the same for (-A, -B). Use that, vector.cast('weight'), or the "
                "change from its start: linlora.formats.read(folder, point=start)"
            )

    def check_same_layers(self, other: TaskVector) -> None:
        """Raise a DifferentPointError unless the vectors have the same layers, with the same shapes."""
        if set(self.deltas) != set(other.deltas):
            odd = sorted(set(self.deltas) ^ set(other.deltas))
            raise DifferentPointError(f"the vectors cover different layers; only one of them has {some(odd)}")
        mine, others = shapes(self.deltas), shapes(other.deltas)
        odd = sorted(name for name in mine if mine[name].shape != others[name].shape)
        if odd:
            pair = f"{tuple(mine[odd[0]].shape)} and {tuple(others[odd[0]].shape)}"
            raise DifferentPointError(f"the vectors differ in rank or layer size: {pair} in {some(odd)}")

    def put_into(self, model: PeftModel, adapter: str) -> None:
        """Set an adapter to the vector: `apply`."""
        if self._is_plain_without_start:
            return self.cast("weight").put_into(model, adapter)
        self._matching_layers(model, adapter)
        start = self.known_point("apply") if self.scope == "lora" else {}
        current = TaskVector.from_model(model, adapter, self if self.scope == "lora" else None)
        self.check_same_point(replace(current, base_model=None))
        deltas = dict(self.deltas)
        check_values(deltas)
        for name, parameter in delta_parameters(model, adapter).items():
            delta = deltas[name]
            assign(parameter, start[point_name(name)] + delta if point_name(name) in start else delta, name)

    def check_base(self, model: PeftModel) -> None:
        """Raise a DifferentPointError where the start of the model or of the vector alone changed the base weights."""
        its = changed_base(model.peft_config.values())
        if its != self.changed_base:
            mine, others = (
                f"those that {how} changed" if how else "the original ones" for how in (self.changed_base, its)
            )
            raise DifferentPointError(
                f"the base weights of the vector are {mine}, those of the model {others} (init_lora_weights of its "
                "configs); the vector goes into a model whose adapters are started as those of its own were"
            )

    def _matching_layers(self, model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
        layers = layers_to_change(model, adapter)
        if set(self.scalings) != {name for name, _ in layers}:
            odd = sorted(set(self.scalings) ^ {name for name, _ in layers})
            raise DifferentPointError(f"the vector and the model's adapter '{adapter}' differ in layers: {some(odd)}")
        self.check_base(model)
        return layers


def apply(model: PeftModel, vector: TaskVector, adapter: str | None = None) -> None:
    """Set an adapter (the active one if not named) to a task vector, in place: (dA, dB) become the vector's.

    A linearized adapter has to be at the vector's linearization point, else DifferentPointError; a plain LoRA adapter
    becomes (A0 + dA, B0 + dB) of a vector of scope "lora". A vector in weight space goes into a plain adapter of its
    rank or more; of the layers it lacks B becomes zero.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> linlora.apply(model, 2.0 * linlora.TaskVector.from_model(model))
    """
    adapter = one_adapter(model, adapter)
    with restoring(model):
        vector.put_into(model, adapter)
