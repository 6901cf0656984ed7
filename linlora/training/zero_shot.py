"""Zero-shot classification with CLIP: the frozen text tower builds the classes, the image tower is adapted.

The prototype of a class is the mean, normalised, of the normalised embeddings of its sentences (each template with the
name of the class in it). The logits of an image are its normalised embedding times the prototypes, times CLIP's scale.
The text tower runs once for a model and list of classes, and is let go of; the head stays exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from linlora.training.checkpoints import config_of, image_processor_of, load_model, refuse_new, tokenizer_of
from linlora.training.labels import check_labels, classes_of
from linlora.training.settings import Settings
from linlora.training.similarity import Head, Similarity
from linlora.training.task import Row, images_of

_TEXTS_AT_ONCE = 256


class ZeroShot(Similarity):
    """The image tower of a CLIP model, with a head of class prototypes."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        config = config_of(settings)
        prefix = type(config).__name__.removesuffix("Config")
        self.auto = getattr(transformers, f"{prefix}VisionModelWithProjection", None)
        if self.auto is None or not hasattr(config, "logit_scale_init_value"):
            raise ValueError(
                f"model '{settings.model}' is a {config.model_type}; kind 'zero-shot' takes a CLIP checkpoint, with a "
                "text and an image tower"
            )
        self.processor = image_processor_of(settings)
        check_labels(self.rows("train"), settings.data.label)
        self.classes = classes_of(self.rows("train"), settings.data.label, settings.class_names)
        numbered = not hasattr(self.rows("train").features[settings.data.label], "names")
        if numbered and not settings.class_names and not isinstance(self.classes.values[0], str):
            raise ValueError(
                f"column '{settings.data.label}' holds numbers without names, which say nothing to a text tower; list "
                f"class_names for {', '.join(self.classes.names[:5])}, ..."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (str(self.settings.data.image), self.settings.data.label)

    @property
    def head(self) -> Head:
        settings, names = self.settings, tuple(name.replace("_", " ") for name in self.classes.names)
        key = (settings.model, json.dumps(settings.model_options), names, settings.templates)
        if key not in _HEADS:
            _HEADS[key] = Head(prototypes(settings, names))
        return _HEADS[key]

    @staticmethod
    def pool(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        return outputs.image_embeds

    def base_model(self) -> nn.Module:
        model, new = load_model(self.settings, self.auto)
        refuse_new(self.settings, new)
        return self.ending(model)

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        return dict(self.processor(images=images_of(rows, str(self.settings.data.image)), return_tensors="pt"))


_HEADS: dict[tuple, Head] = {}  # of the checkpoints, class names and templates of this process


def prototypes(settings: Settings, names: Sequence[str]) -> Tensor:
    """The scaled prototypes of some class names, (classes, dimension), in fp32."""
    clip, new = load_model(settings, transformers.AutoModel)
    refuse_new(settings, new)
    tokenizer = tokenizer_of(settings)
    device = settings.device
    clip = clip.to(device)
    sentences = [template.replace("{}", name) for name in names for template in settings.templates]
    options = {"padding": True, "truncation": True, "max_length": clip.config.text_config.max_position_embeddings}
    embeddings = []
    with torch.no_grad():
        for start in range(0, len(sentences), _TEXTS_AT_ONCE):
            tokens = tokenizer(sentences[start : start + _TEXTS_AT_ONCE], **options, return_tensors="pt")
            pooled = clip.text_model(**tokens.to(device)).pooler_output
            embeddings.append(nn.functional.normalize(clip.text_projection(pooled).float(), dim=-1))
        per_class = torch.cat(embeddings).unflatten(0, (len(names), len(settings.templates)))
        found = nn.functional.normalize(per_class.mean(1), dim=-1)
    _check_distinct(found, names)
    return (found * clip.logit_scale.detach().exp().float()).cpu()


def _check_distinct(found: Tensor, names: Sequence[str]) -> None:
    """Raise a ValueError for two classes of one prototype."""
    _, group = found.unique(dim=0, return_inverse=True)
    for i, first in enumerate(group.tolist()):
        if first in group[:i].tolist():
            same = names[group[:i].tolist().index(first)]
            raise ValueError(
                f"the text tower gives the classes '{same}' and '{names[i]}' one prototype: its tokenizer cannot tell "
                "their names apart; set class_names"
            )
