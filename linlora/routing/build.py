"""`route`: put inventories of skills into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from linlora.routing.granularity import selector_of
from linlora.routing.model import RoutedModel
from linlora.routing.routed_layer import LayerSizes, RoutedLayer, check_linear
from linlora.routing.selectors import Selector, Sizes
from linlora.routing.structure import Inventory
from linlora.routing.variants import VARIANTS

LINEAR = (nn.Linear, Conv1D)  # by type: nn.MultiheadAttention reads the weight of its out_proj and never calls it


def route(
    model: nn.Module,
    n_tasks: int,
    *,
    variant: str | type[Selector] = "poly",
    n_skills: int | None = None,
    n_heads: int = 1,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] = (),
    granularity: str = "layer",
    **options: Any,
) -> RoutedModel:
    """Give linear layers of a model an inventory of S skills each, and every task its mixture of them, in place.

    Args:
        model: a transformers or torch model; its parameters are frozen, its layers wrapped, no weight is copied.
        n_tasks: T. Task ids are 0 … T − 1.
        variant: the source of the skills' weights (`linlora.routing.selectors`):
            "poly"     learned per task: Poly with one head, MHR with more (arXiv 2211.03831);
            "private"  a skill for every task;      "shared"   one skill for all tasks;
            "uniform"  the mean of the skills (μ);  "adamix"   a random skill in training, the mean after;
            "gate"     a small network of the layer's input;   "table"   the weights themselves, per task;
            "mode"     rank-one experts by the token (`linlora.routing.dyadic`); or a Selector class of your own.
        n_skills: S, 8 where the variant leaves it open. n_heads: Q, which divides the inputs and outputs of every
            layer. rank: r of every skill.
        alpha: the update is scaled by alpha / r. Left out, by 1; PEFT's Poly has alpha = 1.
        dropout: of the input of the low-rank update.
        target_modules, exclude_modules, modules_to_save: as in PEFT's LoraConfig; without targets, PEFT's own for the
            architecture. A regular expression, or names, matched at the end; "all-linear" is every linear layer but
            the output embedding.
        granularity: "layer", "block" or "model": which layers share a selector.
        options: the selector's: of "poly" sampling, l2_norm, shared_skill, logit_dropout; of "gate" hidden, start.

    Returns: a RoutedModel, to be called with task_ids; `print(routed.report())` lists its layers and selectors.

    Raises ValueError for targets that match nothing (it lists the linear layers), a Q that does not divide a layer
    (it names it), unknown variants and granularities; TypeError for unknown options and a layer that is not linear.

    The order of a layer's rows tells their tasks: its inputs have the examples first, (examples, ..., K), each equally
    often. The forward refuses other sizes. It cannot tell a layer that sees time first (XLNet's) or chosen tokens
    (experts of a mixture) where the sizes happen to divide: leave such layers out of target_modules.

    >>> import torch, linlora
    >>> base, batch = linlora.testing.tiny_base("bert"), linlora.testing.tiny_batch("bert")
    >>> routed = linlora.routing.route(base, n_tasks=5, n_heads=4, rank=4, target_modules=["query", "value"])
    >>> routed(**batch, task_ids=[0, 3, 0], labels=torch.tensor([0, 1, 2])).loss.backward()
    >>> print(routed.report())
    linlora: 4 routed layers
         2 x query            32 -> 32, rank 4, 8 skills in 4 heads, scaling 1
         2 x value            32 -> 32, rank 4, 8 skills in 4 heads, scaling 1
         4 x selector Poly(5 tasks, 8 skills in 4 heads)
      backend: torch
      trainable parameters: 8,832 (skills 8,192, selectors 640)
    """
    _check_model(model)
    selector = _selector_class(variant)
    fixed = {"private": n_tasks, "shared": 1}.get(variant) if isinstance(variant, str) else None
    if fixed is not None and n_skills not in (None, fixed):
        raise ValueError(f"variant {variant!r} has {fixed} skills for {n_tasks} tasks, got n_skills={n_skills}")
    n_skills = fixed or n_skills or 8
    if min(n_tasks, n_skills, n_heads, rank) < 1:
        raise ValueError(
            f"n_tasks, n_skills, n_heads and rank are at least 1, got {n_tasks}, {n_skills}, {n_heads} and {rank}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is a probability below 1, got {dropout}")
    if selector is None and options:
        raise TypeError(f"variant 'mode' takes no option {sorted(options)}")
    saved = _modules_to_save(model, modules_to_save)
    sizes = LayerSizes(n_skills, n_heads, rank, (rank if alpha is None else alpha) / rank, dropout)
    inventories: dict[str, Inventory] = {}
    selectors: dict[str, Selector] = {}
    for name, layer in _targets(model, target_modules, exclude_modules, saved):
        _, inputs = check_linear(name, layer)
        of = selector_of(name, granularity)
        if selector is not None and of not in selectors:
            selectors[of] = selector(Sizes(n_tasks, n_skills, n_heads, inputs), **options)
        elif selector is not None and selector.reads == "input" and selectors[of].sizes.in_features != inputs:
            raise ValueError(
                f"layer '{name}' has {inputs} inputs and shares its selector with a layer of "
                f"{selectors[of].sizes.in_features}; a selector that reads the input needs granularity='layer' here"
            )
        inventories[name] = Inventory(sizes, None if selector is None else of)
    return RoutedModel(model, inventories, selectors, saved)


def _selector_class(variant: str | type[Selector]) -> type[Selector] | None:
    """The class of a variant; None for "mode", which has none."""
    if isinstance(variant, type) and issubclass(variant, Selector):
        return variant
    named = {**VARIANTS, "shared": VARIANTS["uniform"], "mode": None}
    if variant not in named:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(sorted(named))}, or a Selector class")
    return named[variant]


def _targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    exclude_modules: Sequence[str] | str | None,
    saved: Sequence[str],
) -> list[tuple[str, Any]]:
    if target_modules is None:
        architecture = getattr(getattr(model, "config", None), "model_type", None)
        target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture)
        if target_modules is None:
            raise ValueError(
                f"PEFT names no layers to adapt in a {architecture or type(model).__name__}; pass target_modules="
                f"[...] of: {_candidates(model)}"
            )
    if target_modules == "all-linear":
        own: Any = model
        output = own.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        target_modules = [
            name for name, module in model.named_modules() if type(module) in LINEAR and module is not output
        ]
    config = LoraConfig(target_modules=_as_peft_takes(target_modules), exclude_modules=_as_peft_takes(exclude_modules))
    inside = tuple(f"{name}." for name in saved)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if check_target_module_exists(config, name) and name not in saved and not name.startswith(inside)
    ]
    if not found:
        raise ValueError(
            f"target_modules {target_modules} match no layer of {type(model).__name__}. Its linear layers are: "
            f"{_candidates(model)}"
        )
    for name, module in found:
        if type(module) not in LINEAR:
            raise TypeError(
                f"layer '{name}' is a {type(module).__name__}; only nn.Linear and transformers' Conv1D can be "
                "routed, so leave it out of target_modules or name it in exclude_modules"
            )
    return found


def _as_peft_takes(names: Sequence[str] | str | None) -> list[str] | str | None:
    return names if names is None or isinstance(names, str) else list(names)


def _modules_to_save(model: nn.Module, names: Sequence[str]) -> list[str]:
    found = []
    for wanted in names:
        matches = [name for name, _ in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not matches:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save: {type(model).__name__} has no module '{wanted}'; it has {children}")
        found += matches
    return found


def _candidates(model: nn.Module) -> str:
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) in LINEAR})) or "none"


def _check_model(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or any(isinstance(m, (RoutedLayer, BaseTunerLayer)) for m in model.modules()):
        raise TypeError(
            f"route takes a model without adapters, got {type(model).__name__} with some: pass the base model "
            "(peft_model.unload()), or convert a PEFT Poly model with linlora.routing.convert"
        )
