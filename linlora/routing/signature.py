"""The `forward` of a routed model, with the signature of its base model's."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

OWN = ("task_ids", "mixture")
"""Arguments that a routed model takes in addition to those of its base model."""


class SignedForward:
    """Calls the `forward` of a routed model's class; its signature is the base model's with `task_ids` and `mixture`.

    The HF Trainer reads there which columns of a data set the model takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = [p for p in inspect.signature(self.model.model.forward).parameters.values() if p.name not in OWN]
        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN]
        at = len(parameters) - sum(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return inspect.Signature([*parameters[:at], *own, *parameters[at:]])
