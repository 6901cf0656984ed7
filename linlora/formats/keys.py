"""The spellings of parameter names in PEFT adapters, from the first release to today's."""

from __future__ import annotations

import re
from typing import NamedTuple

_FACTOR = re.compile(
    r"(?P<layer>.+)\.lora_(?P<kind>[AB])(?:\.(?P<adapter>(?!weight$)[^.]+))?\.weight"  # .default. in state dicts
)
_PREFIXES = ("base_model.model.", "base_model.", "")


class Factor(NamedTuple):
    """A or B of a layer, by its name in the base model."""

    layer: str
    kind: str


def factor(key: str) -> Factor | None:
    """The factor that a key of an adapter file names; None for a parameter that is no LoRA factor.

    >>> factor("base_model.model.encoder.q.lora_A.weight")
    Factor(layer='encoder.q', kind='A')
    >>> factor("base_model.model.encoder.q.lora_B.default.weight")
    Factor(layer='encoder.q', kind='B')
    >>> factor("base_model.model.classifier.weight")
    """
    match = _FACTOR.fullmatch(key)
    return None if match is None else Factor(in_base_model(match["layer"]), match["kind"])


def in_base_model(key: str) -> str:
    """A name in the PEFT model as a name in the base model.

    >>> in_base_model("base_model.model.classifier.modules_to_save.default.weight")
    'classifier.weight'
    """
    key = next(key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix))
    return re.sub(r"\.modules_to_save(\.default(?=\.))?|\.base_layer(?=\.)", "", key)


def unused(key: str) -> bool:
    """Whether a key names the original that PEFT keeps beside a trained module."""
    return ".original_module." in key
