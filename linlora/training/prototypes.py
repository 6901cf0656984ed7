"""Classification by prototypes: each class is the mean of its examples' features in the model as it was pre-trained.

With μ_k the mean of the pooled features of class k and c that of all μ_k, P_k = s · normalise(μ_k - c). Nothing is
trained beside the adapter, so that adapters of many tasks go with one frozen model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from linlora.training.checkpoints import load_model, refuse_new
from linlora.training.classification import Classification
from linlora.training.settings import Settings
from linlora.training.similarity import Head, Similarity
from linlora.training.task import listed

_SCALE = 16.0
_EXAMPLES = 100
"""The first examples of a class, whose mean is its prototype."""
_AT_ONCE = 64


class Prototypes(Similarity, Classification):
    """Texts or images, by the similarity of their pooled features to the prototypes of the classes."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if self.config.is_encoder_decoder or type(self.config) not in transformers.MODEL_MAPPING:
            raise ValueError(
                f"model '{settings.model}' is a {self.config.model_type}; head: prototypes takes an encoder, whose "
                "hidden states are pooled"
            )
        if self.answer != "classes":
            raise ValueError(
                f"head: prototypes classifies, and {self.labels_in_words()}; set head: trained, or class_names"
            )
        self.auto, self.task_type = transformers.AutoModel, None

    @functools.cached_property
    def head(self) -> Head:
        """Made from rows of the train split, or of `data.prototypes`."""
        split = "train" if self.settings.data.prototypes is None else "prototypes"
        self.check(split)
        rows, label = self.rows(split), self.settings.data.label
        chosen: dict[int, list[int]] = {k: [] for k in range(self.class_count)}
        for i, value in enumerate(rows[label]):
            of_class = chosen[self.classes.index(value)]
            if len(of_class) < _EXAMPLES:
                of_class.append(i)
        missing = [self.classes.names[k] for k, of_class in chosen.items() if not of_class]
        if missing:
            raise ValueError(f"no example of {listed(missing)}, which a prototype is the mean of")
        model = self._encoder().to(self.settings.device)
        means = torch.stack([self._mean(model, rows.select(of_class)) for of_class in chosen.values()]).cpu()
        centre = means.mean(0)
        return Head(_SCALE * nn.functional.normalize(means - centre, dim=-1), centre)

    @staticmethod
    def pool(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over tokens, those that pad aside."""
        hidden = outputs.last_hidden_state
        mask = inputs.get("attention_mask")
        if mask is None:
            return hidden.flatten(1, -2).mean(1)
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def base_model(self) -> nn.Module:
        return self.ending(self._encoder())

    def _encoder(self) -> nn.Module:
        model, new = load_model(self.settings, self.auto)
        refuse_new(self.settings, [name for name in new if not name.startswith("pooler.")])
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None  # of the first token, and not used
        return model

    @torch.no_grad()
    def _mean(self, model: nn.Module, rows: Any) -> Tensor:
        """The mean of the features of some rows, (d,), in fp32."""
        device, total = next(model.parameters()).device, torch.zeros(())
        for batch in rows.iter(_AT_ONCE):
            examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            inputs = {name: value.to(device) for name, value in self.inputs(examples).items()}
            total = total + self.pool(model(**inputs), inputs).float().sum(0).cpu()
        return total / len(rows)
