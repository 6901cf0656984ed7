"""The names of base models: one model is named as on the hub, by the hub's cache, or by a folder."""

from __future__ import annotations

from pathlib import PurePath

from linlora.vectors.points import DifferentPointError


def common_base(*names: str | None) -> str | None:
    """The one base model that vectors name, by its shortest name; None if none does.

    Raises DifferentPointError for two models.

    >>> common_base("org/Base", None, "./Base/")
    './Base/'
    """
    named = [name for name in names if name]
    for name in named:
        if model_name(name) != model_name(named[0]):
            raise DifferentPointError(
                f"the adapters are of different base models, '{named[0]}' and '{name}'. If the two are the same "
                "weights, name them once: --base NAME, or dataclasses.replace(vector, base_model=NAME)"
            )
    return min(named, key=lambda name: (len(name), name), default=None)


def model_name(base_model: str) -> str:
    """The name of a model, whatever folder it is in, for instance one of the hub's cache.

    >>> model_name("/cache/hub/models--Org--Base/snapshots/0a1b"), model_name("./Base/")
    ('base', 'base')
    """
    parts = PurePath(base_model).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or ("",))[-1].lower()
