"""Vanilla LoRA, ΔW = s B A with trained A and B and nothing else: the one rule that says which adapters are it.

Two things tell: the configuration (`not_vanilla_config`), whose every field is in one of the tables below, and the
layers or tensors (`not_vanilla_layer`, `not_a_factor`). Whatever reads, exports, merges or fuses an adapter asks here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

FOLLOWED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias",
    "modules_to_save", "trainable_token_indices", "fan_in_fan_out", "task_type", "base_model_name_or_path",
}  # fmt: skip
"""Fields that linlora takes into account."""

INERT = {
    "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config",  # where it comes from, how it runs
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",  # the tensors say which layers
    "ensure_weight_tying",  # the tensors say what was trained
    "lora_dropout",  # of training
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # options of a value of init_lora_weights
    "qalora_group_size", "megatron_core",  # options of a field that is refused
    "merge_weights",  # PEFT 0.1 and 0.2: whether eval() merges
}  # fmt: skip
"""Fields that change nothing of what given A and B compute."""

REFUSED = {
    "use_dora": "DoRA scales the rows of W + s B A by trained magnitudes",
    "velora_config": "VeLoRA has a backward pass of its own",
    "alora_invocation_tokens": "aLoRA acts after its invocation tokens alone",
    "use_qalora": "QALoRA pools the input",
    "monteclora_config": "MonteCLoRA samples around A and B",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters by the token",
    "kasa_config": "KaSA has singular values between A and B and a truncated base",
    "lora_bias": "B has a bias",
    "target_parameters": (
        "a LoRA of parameters that are no linear layer (the experts of a mixture), of which each slice has factors of "
        "its own"
    ),
    "layer_replication": "its layers are numbered as in a model in which some are repeated, which no base folder holds",
    "megatron_config": "its layers are Megatron's, and a file holds one process's part of them",
    "enable_lora": "its factors are of parts of a layer (the MergedLinear of PEFT 0.1 and 0.2)",
}
"""Fields that make another function of A and B, and how; off where None or False."""

REMEDY = "PEFT runs this adapter; linlora takes vanilla LoRA, s B A on linear layers"
LARGEST_SCALING = 1e6
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PARTS = {
    "lora_embedding_": "a LoRA of an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_velora_": "VeLoRA",
    "lora_diag": "KaSA",
    "vera_lambda": "VeRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_E": "AdaLoRA",
    "lora_mid": "a LoRA of a convolution",
    "lora_down": "a LoRA of another library (kohya, diffusers)",
    "lora_up": "a LoRA of another library (kohya, diffusers)",
}


def not_vanilla_config(config: Mapping[str, Any] | LoraConfig, in_its_model: bool = False) -> str | None:
    """Why a configuration is not that of vanilla LoRA, by the name of a field, or None.

    Args:
        config: a LoraConfig, or the content of `adapter_config.json`, which another version of PEFT may have written: a
            field that no table here names is refused unless it is off.
        in_its_model: whether the layers stay in the model they were made in, which may repeat some (layer_replication).

    >>> not_vanilla_config({"r": 8, "use_dora": True})
    'use_dora is set: DoRA scales the rows of W + s B A by trained magnitudes'
    >>> not_vanilla_config({"r": 8, "use_dora": False, "use_rslora": True, "of_tomorrow": None})
    >>> not_vanilla_config({"r": 8, "of_tomorrow": 2})
    'of_tomorrow is set, a field this linlora does not know: it may make another function of A and B. Update linlora'
    >>> from peft import LoraConfig
    >>> not_vanilla_config(LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1]))
    'alora_invocation_tokens is set: aLoRA acts after its invocation tokens alone'
    """
    in_file = isinstance(config, Mapping)
    for name, value in (config if isinstance(config, Mapping) else _changed(config)).items():
        off = value is None or value is False or (in_its_model and name == "layer_replication")
        off = off or (name == "target_parameters" and not value)  # PEFT leaves an empty set on every mixture of experts
        if name in REFUSED and not off:
            return f"{name} is set: {REFUSED[name]}"
        if name not in FOLLOWED | INERT | REFUSED.keys() and not (in_file and (off or value in ("", [], {}))):
            return (
                f"{name} is set, a field this linlora does not know: it may make another function of A and B. Update "
                "linlora"
            )
    return None


def _changed(config: LoraConfig) -> dict[str, Any]:
    """The fields of a LoraConfig that are not at their defaults."""
    changed = {}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if (value := getattr(config, field.name)) != default:
            changed[field.name] = value
    return changed


def not_vanilla_layer(layer: Any, adapters: Sequence[str]) -> str | None:
    """Why these adapters of a PEFT LoRA layer are not the B A x that the op computes, or None."""
    variants = {type(layer.lora_variant[name]).__name__ for name in adapters if name in layer.lora_variant}
    if variants:
        return (
            f"its adapters use the variant {', '.join(sorted(variants))} (DoRA, aLoRA, ...); only vanilla LoRA is "
            "linearized"
        )
    if any(layer.use_dora.get(name) for name in adapters):
        return "its adapters use DoRA; only vanilla LoRA is linearized"
    if any(layer.lora_bias.get(name) for name in adapters):
        return "its adapters use lora_bias=True; create them with lora_bias=False"
    return None


def not_a_factor(key: str) -> str | None:
    """The kind of adapter that a tensor of a file belongs to which is neither A nor B, or None for one of the base.

    >>> not_a_factor("base_model.model.q.lora_magnitude_vector")
    'DoRA'
    >>> not_a_factor("base_model.model.q.lora_of_tomorrow.weight")
    'a variant of LoRA'
    """
    if ".lora_" in key and key.endswith(".bias"):
        return "a LoRA with bias"
    named = next((what for part, what in _PARTS.items() if part in key), None)
    return named or ("a variant of LoRA" if ".lora_" in key else None)


def usable_scaling(scaling: Any) -> bool:
    """Whether s can be meant: a finite number, no larger than a million.

    >>> usable_scaling(2.0), usable_scaling(float("nan")), usable_scaling(10**400), usable_scaling(True)
    (True, False, False, False)
    """
    number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    return number and -LARGEST_SCALING <= scaling <= LARGEST_SCALING


def changes_base(init_lora_weights: Any) -> bool:
    """Whether an initialization takes the adapter's start out of the base weights.

    >>> changes_base("pissa_niter_4"), changes_base("gaussian"), changes_base(True)
    (True, False, False)
    """
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_CHANGE_THE_BASE)


def changed_base(configs: Iterable[Any]) -> str | None:
    """The initializations that changed the base weights of a model with adapters of these configs, or None.

    >>> from peft import LoraConfig
    >>> changed_base([LoraConfig(), LoraConfig(init_lora_weights="pissa_niter_4")])
    'pissa_niter_4'
    """
    starts = {config.init_lora_weights.lower() for config in configs if changes_base(config.init_lora_weights)}
    return ", ".join(sorted(starts)) or None


def refuse_changed_base(init_lora_weights: Any, what: str) -> None:
    """Raise a ValueError for an initialization that takes the adapter's start out of the base weights, as PiSSA does.

    The adapter is then of weights that are in no file: added to the original ones it is another function. One that
    linlora does not know is refused as well.

    >>> refuse_changed_base("gaussian", "adapter")
    >>> refuse_changed_base("pissa_niter_4", "adapter")
    Traceback (most recent call last):
    ValueError: adapter: init_lora_weights 'pissa_niter_4' changes the base weights, and the adapter is of the changed \
ones; merge it in its own model (linlora.merge), or convert it to an adapter of the original weights by PEFT's \
save_pretrained(..., path_initial_model_for_weight_conversion=START)
    """
    if changes_base(init_lora_weights):
        raise ValueError(
            f"{what}: init_lora_weights '{init_lora_weights}' changes the base weights, and the adapter is of the "
            "changed ones; merge it in its own model (linlora.merge), or convert it to an adapter of the original "
            "weights by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=START)"
        )
    if not any(init_lora_weights is start or init_lora_weights == start for start in _STARTS):
        raise ValueError(
            f"{what}: init_lora_weights {init_lora_weights!r} is unknown to this linlora, and may change the base "
            "weights; update linlora"
        )
