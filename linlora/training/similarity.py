"""Heads of prototypes, and `Settings.linear_to`: where the function that is linearized ends.

    features = pool(hidden states)
    scores   = normalise(features - centre) Pᵀ       P (classes, d) holds the scaled prototypes, centre (d,) or none

At model scope F(δ) = f(φ0) + J δ is either the "scores", with pooling, normalisation and product inside f, or the
"features", which are normalised afterwards. For one adapter the two differ little; fused ones keep more of their scores
where the scores are linear. Plain LoRA and layer scope are the same function either way.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from linlora.training.task import Task

Pool = Callable[[Any, Mapping[str, Any]], Tensor]
"""Takes the outputs and the inputs of a model; returns the features, (rows, d)."""


class Head(NamedTuple):
    """The prototypes, times their scale, (classes, d), and what is taken off the features before, (d,)."""

    prototypes: Tensor
    centre: Tensor | None = None

    def scores(self, features: Tensor) -> Tensor:
        """(rows, classes), in fp32."""
        features = features.float()
        if self.centre is not None:
            features = features - self.centre.to(features.device)
        length = features.square().sum(-1, keepdim=True).sqrt()  # functions that model scope has rules for
        return (features / (length + 1e-12)) @ self.prototypes.to(features.device).T


class Similarity(Task):
    """A task whose head is prototypes: frozen, and exact."""

    answer = "classes"
    classes: Any  # never None

    @property
    @abstractmethod
    def head(self) -> Head: ...

    @staticmethod
    @abstractmethod
    def pool(outputs: Any, inputs: Mapping[str, Any]) -> Tensor: ...

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.enter(model):
            return self.scored(model(**inputs), torch.empty(0))[0]
        return self.head.scores(self.pool(model(**inputs), inputs))  # a model as transformers has it

    def scored(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.logits if self.settings.ends_at == "scores" else self.head.scores(outputs.logits), labels

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Any]:
        return self.logits(model, inputs).argmax(-1).tolist()

    def ending(self, model: nn.Module) -> nn.Module:
        """The model with pooling, and with `linear_to: scores` the head, in its forward; its modules are the same."""
        model.__class__ = _ending(type(model), self.pool, self.settings.ends_at == "scores")  # type: ignore[arg-type]
        self.enter(model)
        return model

    def enter(self, model: nn.Module) -> bool:
        """Put the head into a model of `ending`; False for another model."""
        base: Any = getattr(model, "module", model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        if not getattr(type(base), "takes_prototypes", False):
            return False
        base.prototypes = self.head
        return True


@functools.cache
def _ending(own: type[nn.Module], pool: Pool, with_scores: bool) -> type[nn.Module]:
    """The class of a model, with another end of its forward."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> SequenceClassifierOutput:
        features = pool(own.forward(self, *args, **kwargs), kwargs)
        return SequenceClassifierOutput(logits=self.prototypes.scores(features) if with_scores else features)

    return type(own.__name__, (own,), {"forward": forward, "takes_prototypes": True, "prototypes": None})
