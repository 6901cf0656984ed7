"""Task vectors: what training changed, (dA, dB) of every layer, together with the point it was changed from.

Vectors of one linearization point form a vector space: add, subtract, scale, take norms and cosines. Vectors of
different points do not, and mixing them is an error. What they add to the weights does (linlora.vectors.weight_vector).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from linlora.layers.restoring import restoring
from linlora.layers.sharding import check_there, sharded_like, whole
from linlora.layers.vanilla import changed_base, not_vanilla_config, not_vanilla_layer, usable_scaling
from linlora.storage.files import CorruptFileError, parse_json
from linlora.storage.tensor_files import StoredTensors, TensorFile, finite, save_tensors, shapes

FORMAT = "linlora.task_vector"
FORMAT_VERSION = "2"
_VERSIONS = ("1", FORMAT_VERSION)  # 1 had checksums of the tensors alone


_PARTNERS = {"dA": "A0", "dB": "B0", "A0": "dA", "B0": "dB"}


class DifferentPointError(ValueError):
    """Vectors (or a vector and a model) of different linearization points, scopes or layers were combined."""


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
        """Vectors of this scope are of the class, whose algebra is another."""
        TaskVector._spaces[scope] = cls

    @classmethod
    def from_model(cls, model: PeftModel, adapter: str | None = None, point: TaskVector | None = None) -> TaskVector:
        """Read the vector of an adapter (the active one if not named), copied to the CPU.

        A plain LoRA adapter has no linearization point of its own: pass as `point` the vector read before training
        (without one, its current values are the point and the vector is zero).

        Raises ValueError for an adapter that is more than A and B of linear layers.
        """
        adapter = _one_adapter(model, adapter)
        if point is not None and point.scope == "weight":
            raise ValueError("from_model: a vector in weight space is no point; pass TaskVector.from_model(start)")
        deltas: dict[str, Tensor] = {}
        points: dict[str, Tensor] = {}
        scalings = {}
        scopes = set()
        for name, layer in adapter_layers(model, adapter):
            state = getattr(layer, "states", {}).get(adapter, "plain")
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scopes.add("lora" if state == "plain" else "layer" if layer.stream is None else "model")
            scalings[name] = float(layer.scaling[adapter])
            if state == "short":
                points[f"{name}.A0"], deltas[f"{name}.dB"] = _copy(A), _copy(B)
            elif state == "pair":
                points[f"{name}.A0"], points[f"{name}.B0"] = _copy(A), _copy(B)
                deltas[f"{name}.dA"] = _copy(layer.lora_dA[adapter])
                deltas[f"{name}.dB"] = _copy(layer.lora_dB[adapter])
            else:
                for kind, factor in (("A", A), ("B", B)):
                    current, start = _copy(factor), f"{name}.{kind}0"
                    if point is None or point.point is None:
                        points[start] = current
                    elif start in point.point:
                        points[start] = point.point[start]
                    deltas[f"{name}.d{kind}"] = current - points[start] if start in points else current
        if len(scopes) != 1:
            raise ValueError(
                f"adapter '{adapter}' is linearized in some layers and plain in others: linearize the model"
            )
        base_model = getattr(model.peft_config[adapter], "base_model_name_or_path", None)
        changed = changed_base(model.peft_config.values())
        vector = cls(deltas, points, point_hash(points), scalings, scopes.pop(), base_model, changed)
        if point is not None and point.point != {}:
            vector.check_same_point(replace(point, scalings=scalings))  # a point has none of its own
        return vector

    def save(self, path: str | os.PathLike, include_point: bool = True) -> None:
        """Write a safetensors file; a killed save leaves the previous file whole.

        With `include_point=False` the point is stored as its hash only: smaller, and usable with a model that is at
        that point already.
        """
        check_scalings(self.scalings, "save")
        parts = [self.deltas, (self.point or {}) if include_point else {}]
        home = {name: part for part in parts for name in part}
        like = {name: tensor for part in parts for name, tensor in shapes(part).items()}
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "scope": self.scope,
            "point_hash": self.point_hash,
            "scalings": json.dumps(self.scalings),
            "base_model": self.base_model or "",
            **({"changed_base": self.changed_base} if self.changed_base else {}),
            **self.own_metadata(),
        }
        save_tensors(path, StoredTensors(like, lambda name: home[name][name]), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskVector:
        """Read what `save` wrote; refuses truncated, foreign, NaN-carrying and altered files by name."""
        return cls.open(path).loaded()

    @classmethod
    def open(cls, path: str | os.PathLike) -> TaskVector:
        """The vector `load` reads, left in its file: a tensor is read, and checked, whenever it is asked for.

        `linlora.fuse` of a list of such vectors is one itself, and to `save` that one streams through the files.

        >>> import linlora
        >>> model = linlora.testing.tiny_model("bert")
        >>> _ = linlora.linearize(model)
        >>> TaskVector.from_model(model).save("vector.safetensors")
        >>> linlora.fuse([TaskVector.open("vector.safetensors")] * 8, "ties").save("fused.safetensors")
        """
        metadata = (file := TensorFile(path)).metadata
        if metadata.get("format") != FORMAT:
            raise CorruptFileError(f"{path}: not a task vector (no '{FORMAT}' in its metadata)")
        version = metadata.get("format_version")
        if version not in _VERSIONS:
            raise CorruptFileError(
                f"{path}: format version {version}, this linlora reads {', '.join(_VERSIONS)}; update linlora"
            )
        if version != "1" and not file.has_checksum:
            raise CorruptFileError(f"{path}: its metadata has no checksum; the file was altered")
        if missing := [key for key in ("scope", "point_hash", "scalings", "base_model") if key not in metadata]:
            raise CorruptFileError(f"{path}: its metadata has no {_some(missing)}; the file was altered")
        deltas = {name: file.like(name) for name in file.entries if name.endswith((".dA", ".dB"))}
        point = {name: file.like(name) for name in file.entries if name not in deltas}
        scalings = parse_json(metadata["scalings"], f"{path}: its scalings")
        check_scalings(scalings, str(path))
        layers = {name.rpartition(".")[0] for name in deltas}
        scope = metadata["scope"]
        if scalings.keys() != layers or scope not in ("lora", "layer", "model", "weight"):
            raise CorruptFileError(f"{path}: its metadata does not fit its tensors; the file was altered")
        _check_shapes(path, deltas, point)
        if scope == "lora" and metadata["point_hash"] == point_hash({}):
            scope = "weight"  # A and B without a start, as linlora wrote plain adapters before it knew weight space
        if scope == "weight" and (lost := [layer for layer in layers if f"{layer}.dA" not in deltas]):
            raise CorruptFileError(f"{path}: layer '{lost[0]}' has no A; the file was altered")
        vector = (cls._spaces[scope] if scope == "weight" else cls)(
            StoredTensors(deltas, file.read), StoredTensors(point, file.read), metadata["point_hash"],
            {layer: float(s) for layer, s in scalings.items()}, scope, metadata["base_model"] or None,
            metadata.get("changed_base"),
        )  # fmt: skip
        if not point and vector.point_hash != point_hash({}):
            return replace(vector, point=None)
        vector = vector.with_metadata(metadata)
        if not file.has_checksums and point_hash(vector.point or {}) != vector.point_hash:
            raise CorruptFileError(f"{path}: the linearization point does not match its hash; the file was altered")
        return vector

    def own_metadata(self) -> dict[str, str]:
        """What a file says of the vector beside its tensors and what every vector has."""
        return {}

    def with_metadata(self, metadata: Mapping[str, str]) -> TaskVector:
        """The vector with what a file says of it beside that."""
        return self

    def loaded(self) -> TaskVector:
        """The vector in memory: one that lies in files is read, or computed, whole."""
        return replace(self, deltas=dict(self.deltas), point=None if self.point is None else dict(self.point))

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
        """The same displacement from the same point as a vector of scope "layer" or "model": another function of it.

        To "weight": the same function, as the ΔW it adds to the base weights (`WeightVector`), its point's included.
        A vector of plain LoRA training (scope "lora") becomes one of the tangent space at the point it started from:
        post-hoc linearization, `f(φ0) + J (φ - φ0)`. Where B0 = 0 its dA has no effect there and is dropped.
        """
        if scope == "weight":
            return self._spaces[scope].of(self)
        if scope not in ("layer", "model"):
            raise ValueError(f"cast: unknown scope {scope!r}; choose 'layer', 'model' or 'weight'")
        if self.scope != "lora":
            return replace(self, scope=scope)
        if self.point is None:
            raise ValueError("cast: a vector of plain LoRA needs its point, it was saved with include_point=False")
        if not self.point:
            raise ValueError(
                "cast: the vector starts from zero, where A0 = B0 = 0 and the tangent space is empty; a plain adapter "
                "has to be read with the adapter its training started from: linlora.formats.read(folder, point=start)"
            )
        zero = [name for name in self.scalings if f"{name}.B0" not in self.point or not self.point[f"{name}.B0"].any()]
        without = {f"{name}.B0" for name in zero} | {f"{name}.dA" for name in zero}
        point = {name: tensor for name, tensor in self.point.items() if name not in without}
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
        if self.point is None:
            raise ValueError(
                "the vector was saved without its point (include_point=False), so no model can be moved to it"
            )
        adapter = _one_adapter(model, None)
        layers = self._matching_layers(model, adapter)
        for name, layer in layers:
            assign(layer.lora_A[adapter].weight, self.point.get(f"{name}.A0", 0.0), f"{name}.A0")
            assign(layer.lora_B[adapter].weight, self.point.get(f"{name}.B0", 0.0), f"{name}.B0")

    def _combine(self, other: TaskVector, operation: Callable[[Tensor, Tensor], Tensor]) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        self.check_same_point(other)
        return replace(self, deltas={n: operation(delta, other.deltas[n]) for n, delta in self.deltas.items()})

    def check_same_point(self, other: TaskVector) -> None:
        """Raise a DifferentPointError unless the vectors have one scope, layers, scalings and point: then they add."""
        self._check_displacement()
        self.check_same_scope(other)
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
                where = f"; they differ in {_some(odd)}" if odd else ""
            raise DifferentPointError(
                "the vectors start from different linearization points and live in different tangent spaces" + where +
                ". Train every task from one adapter: linearize(model, point=first_vector)"
            )  # fmt: skip

    def check_same_scope(self, other: TaskVector) -> None:
        """Raise a DifferentPointError for vectors of two scopes."""
        if self.scope != other.scope:
            raise DifferentPointError(
                f"a vector of scope '{self.scope}' and one of scope '{other.scope}' do not add; what they add to the "
                "weights does, except at scope 'model': vector.cast('weight')"
            )

    def _check_displacement(self) -> None:
        """Raise a DifferentPointError for a plain adapter without its start: A and B, whose product is what it adds."""
        if self.scope == "lora" and self.point_hash == point_hash({}):
            raise DifferentPointError(
                "the vector is a plain adapter without its start, A and B themselves. They do not add, nor scale: what "
                "the adapter adds is their product, the same for (-A, -B). Use that, vector.cast('weight'), or the "
                "change from its start: linlora.formats.read(folder, point=start)"
            )

    def check_same_layers(self, other: TaskVector) -> None:
        """Raise a DifferentPointError unless the vectors have the same layers, with the same shapes."""
        if set(self.deltas) != set(other.deltas):
            odd = sorted(set(self.deltas) ^ set(other.deltas))
            raise DifferentPointError(f"the vectors cover different layers; only one of them has {_some(odd)}")
        mine, others = shapes(self.deltas), shapes(other.deltas)
        odd = sorted(name for name in mine if mine[name].shape != others[name].shape)
        if odd:
            pair = f"{tuple(mine[odd[0]].shape)} and {tuple(others[odd[0]].shape)}"
            raise DifferentPointError(f"the vectors differ in rank or layer size: {pair} in {_some(odd)}")

    def put_into(self, model: PeftModel, adapter: str) -> None:
        """Set an adapter to the vector: `apply`."""
        if self.scope == "lora" and self.point_hash == point_hash({}):
            return self.cast("weight").put_into(model, adapter)
        self._matching_layers(model, adapter)
        if self.scope == "lora" and self.point is None:
            raise ValueError("apply: a vector of plain LoRA needs its point, it was saved with include_point=False")
        current = TaskVector.from_model(model, adapter, self if self.scope == "lora" else None)
        self.check_same_point(current)
        deltas = dict(self.deltas)
        check_values(deltas)
        start = (self.point or {}) if self.scope == "lora" else {}
        for name, parameter in delta_parameters(model, adapter).items():
            delta = deltas[name]
            assign(parameter, start[point_name(name)] + delta if point_name(name) in start else delta, name)

    def check_base(self, model: PeftModel) -> None:
        """Raise a DifferentPointError where a start changed the base weights of the model, or of the vector, alone."""
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
        layers = list(adapter_layers(model, adapter))
        if set(self.scalings) != {name for name, _ in layers}:
            odd = sorted(set(self.scalings) ^ {name for name, _ in layers})
            raise DifferentPointError(f"the vector and the model's adapter '{adapter}' differ in layers: {_some(odd)}")
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
    adapter = _one_adapter(model, adapter)
    with restoring(model):
        vector.put_into(model, adapter)


def delta_parameters(model: PeftModel, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that hold an adapter's change, by their names in a TaskVector: '<layer>.dA', '<layer>.dB'.

    Of a plain LoRA layer they are A and B themselves; where B0 = 0 a linearized layer has dB alone.
    """
    adapter = _one_adapter(model, adapter)
    parameters = {}
    for name, layer in adapter_layers(model, adapter):
        state = getattr(layer, "states", {}).get(adapter, "plain")
        if state == "pair":
            parameters[f"{name}.dA"], parameters[f"{name}.dB"] = layer.lora_dA[adapter], layer.lora_dB[adapter]
        else:
            if state == "plain":
                parameters[f"{name}.dA"] = layer.lora_A[adapter].weight
            parameters[f"{name}.dB"] = layer.lora_B[adapter].weight
    return parameters


def point_name(name: str) -> str:
    """The name, in a vector's point, of the factor that a delta changes.

    >>> point_name("encoder.dense.dA")
    'encoder.dense.A0'
    """
    layer, _, delta = name.rpartition(".")
    return f"{layer}.{delta.removeprefix('d')}0"


def adapter_layers(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    layers: list[tuple[str, Any]] = [
        (path.removeprefix("base_model.model."), module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    ]
    for name, layer in layers:
        linear = adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
        why = (
            not_vanilla_layer(layer, [adapter])
            if linear
            else f"it is a {type(layer).__module__}.{type(layer).__name__}"
        )
        if why is not None:
            raise ValueError(
                f"adapter '{adapter}' has no task vector, which would lose a part of layer '{name}': {why}. A vector "
                "holds vanilla LoRA on linear layers; PEFT's save_pretrained keeps this adapter"
            )
        check_there(f"adapter '{adapter}'", ((n, p) for n, p in layer.named_parameters(name) if "lora_" in n))
    if (why := not_vanilla_config(model.peft_config[adapter])) is not None:
        raise ValueError(f"adapter '{adapter}' has no task vector: {why}. PEFT's save_pretrained keeps this adapter")
    if not layers:
        raise ValueError(f"the model has no LoRA layer with an adapter '{adapter}'")
    return layers


def _one_adapter(model: PeftModel, adapter: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise TypeError(f"a PeftModel is expected, got {type(model).__name__}")
    names = [adapter] if adapter is not None else list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"adapters {names} are active; name one of them with adapter=...")
    if names[0] not in model.peft_config:
        raise ValueError(f"no adapter '{names[0]}'; the model has {sorted(model.peft_config)}")
    return names[0]


def check_scalings(scalings: Mapping[str, Any], where: str) -> None:
    """Raise a CorruptFileError unless every scaling is a finite number of ordinary size."""
    for layer, scaling in scalings.items():
        if not usable_scaling(scaling):
            raise CorruptFileError(
                f"{where}: layer '{layer}' has the LoRA scaling {reprlib.repr(scaling)}, which cannot be meant"
            )


def _check_shapes(path: str | os.PathLike, deltas: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> None:
    """Raise a CorruptFileError unless the tensors of each layer are factors (r, K) and (N, r) that fit each other."""
    tensors = {**deltas, **point}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind not in ("dA", "dB", "A0", "B0") or f"{layer}.dB" not in deltas or tensor.dim() != 2:
            raise CorruptFileError(f"{path}: '{name}' {tuple(tensor.shape)} is no factor of a layer in it")
        if not tensor.is_floating_point():
            raise CorruptFileError(f"{path}: '{name}' is {tensor.dtype}; factors are of floating point")
        like = tensors.get(f"{layer}.{_PARTNERS[kind]}", tensor)
        rank = tensor.shape[0 if kind in ("dA", "A0") else 1]
        if tensor.shape != like.shape or rank != deltas[f"{layer}.dB"].shape[1]:
            raise CorruptFileError(
                f"{path}: '{name}' {tuple(tensor.shape)} does not fit the other factors of its layer; the file was "
                "altered"
            )


def check_values(deltas: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for NaN or infinity, before a model is changed."""
    for name, tensor in deltas.items():
        if not finite(tensor):
            raise ValueError(f"the vector holds NaN or infinity in '{name}'; the model is unchanged")


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True)


def assign(parameter: Tensor, value: Tensor | float, name: str) -> None:
    if isinstance(value, Tensor) and value.shape != parameter.shape:
        raise ValueError(
            f"'{name}' is {tuple(value.shape)} in the vector and {tuple(parameter.shape)} in the model: "
            "their ranks or layer sizes differ; create the adapter with the LoraConfig the vector was trained with"
        )
    with torch.no_grad():
        parameter.fill_(value) if isinstance(value, float) else parameter.copy_(sharded_like(value, parameter))


def point_hash(point: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values. Values are hashed as float64, so a widened copy is the same point."""
    digest = hashlib.sha256()
    for name in sorted(point):
        values = point[name].double() + 0.0  # -0.0 and 0.0 are one value
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
