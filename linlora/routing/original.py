"""Reads checkpoints of the code that was released with multi-head routing (github.com/microsoft/mttl)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linlora.formats.pickles import load_content
from linlora.layers.restoring import restoring
from linlora.routing.inventory import in_words
from linlora.routing.model import RoutedModel
from linlora.routing.routed_layer import LayerSizes
from linlora.routing.selectors import Poly, Private, Selector, Sizes
from linlora.routing.structure import Inventory
from linlora.storage.files import CorruptFileError
from linlora.storage.tensors import finite

Layout = Literal["camera_ready", "skills_first"]
_FACTOR = re.compile(r"^(?P<layer>.+?)\.(?:experts\.)?lora_a$")


def from_original(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Tensor],
    *,
    alpha: float,
    layout: Layout = "camera_ready",
    **options: Any,
) -> RoutedModel:
    """Put a Poly or MHR checkpoint of the original code onto a base model, in place.

    Args:
        model: the base model it was trained on.
        checkpoint: a file of torch.save, a Lightning checkpoint or its state dict; or the state dict itself, of which
            '<layer>.lora_a', '<layer>.lora_b' and '<layer>.selector.module_logits' are read. Without logits, routing is
            private: a skill a task.
        alpha: what the run was trained with (`lora_alpha`; the update is scaled by alpha / r). Not in the file.
        layout: "camera_ready" has lora_a (Q, S, K/Q, r), lora_b (Q, S, r, N/Q); "skills_first", its later form,
            lora_a (S, Q, K/Q, r), lora_b (S, r, Q, N/Q).
        options: of `linlora.routing.Poly`, where the run had them: sampling, l2_norm, shared_skill, logit_dropout.

    Raises FileNotFoundError, CorruptFileError for a file that is not one, ValueError for one without inventories, with
    layers that the model does not have or that do not fit (it names layer and shapes).

    >>> import linlora
    >>> layer = "bert.encoder.layer.0.attention.self.query"
    >>> A, B, Z = torch.randn(2, 3, 16, 4), torch.randn(2, 3, 4, 16), torch.randn(5, 6)
    >>> state = {f"{layer}.lora_a": A, f"{layer}.lora_b": B, f"{layer}.selector.module_logits": Z}
    >>> print(from_original(linlora.testing.tiny_base("bert"), state, alpha=4.0).report())
    linlora: 1 routed layers
         1 x query            32 -> 32, rank 4, 3 skills in 2 heads, scaling 1
         1 x selector Poly(5 tasks, 3 skills in 2 heads)
      backend: torch
      trainable parameters: 798 (skills 768, selectors 30)
    """
    if layout not in ("camera_ready", "skills_first"):
        raise ValueError(f"unknown layout {layout!r}: choose 'camera_ready' or 'skills_first'")
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    found = [match["layer"] for name in state if (match := _FACTOR.match(name))]
    if not found:
        raise ValueError(f"from_original: the checkpoint has no '<layer>.lora_a'; it has {sorted(state)[:3]}, ...")
    modules = dict(model.named_modules())
    inventories: dict[str, Inventory] = {}
    selectors: dict[str, Selector] = {}
    shared: dict[int, str] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path in found:
        name = path if path in modules else path.removeprefix("model.")
        if name not in modules:
            raise ValueError(f"from_original: '{path}' is no layer of {type(model).__name__}; pass the base model")
        A, B = factors[name] = _factors(state, path, layout)
        heads, skills, inputs, rank = A.shape
        logits = state.get(f"{path}.selector.module_logits")
        key = name if logits is None else shared.setdefault(logits.data_ptr(), name)  # one tensor: layers that share it
        if key == name:
            selectors[name] = _selector(logits, name, skills, heads, inputs * heads, options)
        inventories[name] = Inventory(LayerSizes(skills, heads, rank, alpha / rank), key)
        shape = modules[name].weight.shape
        if tuple(shape) != (B.shape[3] * heads, inputs * heads):
            raise ValueError(
                f"from_original: layer '{name}' is {shape[1]} -> {shape[0]}, its inventory in layout '{layout}' "
                f"{inputs * heads} -> {B.shape[3] * heads}; is this its base model, and its layout?"
            )
    with restoring(model):
        routed = RoutedModel(model, inventories, selectors)
        with torch.no_grad():
            for layer in routed.routed_layers:
                for factor, value in zip(layer.skills(), factors[layer.layer_name], strict=True):
                    factor.copy_(value)
        return routed


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content = load_content(path)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{path}: torch.load(weights_only=True) does not read it ({error}). A Lightning checkpoint may hold "
            "objects beside its tensors: if you trust it, pass torch.load(path, weights_only=False)['state_dict'] "
            "instead of the path"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise CorruptFileError(f"{path}: a dictionary of tensors is expected; it holds a {type(state).__name__}")
    return state


def _factors(state: Mapping[str, Tensor], path: str, layout: str) -> tuple[Tensor, Tensor]:
    """A (Q, S, K/Q, r) and B (Q, S, r, N/Q) of a layer."""
    prefix = path if f"{path}.lora_a" in state else f"{path}.experts"
    A, B = state[f"{prefix}.lora_a"], state.get(f"{prefix}.lora_b")
    if B is None or A.dim() != 4 or B.dim() != 4:
        got = f"{tuple(A.shape)}, {None if B is None else tuple(B.shape)}"
        raise ValueError(f"from_original: '{path}' needs lora_a and lora_b of four dimensions, got {got}")
    if not finite(A) or not finite(B):
        raise ValueError(f"from_original: a factor of '{path}' holds NaN or infinity; the run that wrote it diverged")
    if layout == "skills_first":
        A, B = A.transpose(0, 1), B.permute(2, 0, 1, 3)
    if A.shape[:2] != B.shape[:2] or A.shape[3] != B.shape[2]:
        raise ValueError(
            f"from_original: in layout '{layout}' the factors of '{path}' differ in heads, skills or rank: A "
            f"{tuple(A.shape)}, B {tuple(B.shape)} as (Q, S, K/Q, r), (Q, S, r, N/Q); try the other layout"
        )
    return A, B


def _selector(
    logits: Tensor | None, name: str, skills: int, heads: int, inputs: int, options: dict[str, Any]
) -> Selector:
    if logits is None:
        return Private(Sizes(skills, skills, heads, inputs), **options)
    if not finite(logits):
        raise ValueError(f"from_original: the logits of '{name}' hold NaN or infinity; the run that wrote it diverged")
    if logits.dim() != 2 or logits.shape[1] != heads * skills:
        raise ValueError(
            f"from_original: the logits of '{name}' are {tuple(logits.shape)}, expected (tasks, {heads * skills}) for "
            f"{in_words(skills, heads)}; try the other layout"
        )
    selector = Poly(Sizes(len(logits), skills, heads, inputs), **options)
    with torch.no_grad():
        selector.logits.copy_(logits)
    return selector
