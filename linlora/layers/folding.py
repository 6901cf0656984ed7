"""Layer scope as stock LoRA factors, which any LoRA server loads.

A linearized layer is exactly a LoRA layer of rank at most 2r (ΔW = s [(B0 + dB) A0 + B0 dA])::

    A' = [A0; dA]          (2r, K)
    B' = [B0 + dB, B0]     (N, 2r)       same scaling

At B0 = 0 it is (A0, dB) of rank r, which is what PEFT's own parameters hold already. Otherwise `save_pretrained` of a
linearized model writes (A', B') with a matching `adapter_config.json`; a linearized layer that loads such a file takes
it apart again (linlora.layers.adapters).
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor

from linlora.layers.adapters import factor_keys
from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.layers.peft_names import base_name
from linlora.layers.sharding import whole
from linlora.layers.vanilla import changes_base
from linlora.layers.weights import stacked


def folded_state_dict(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of `model` with (A', B') in place of the factors of every adapter that started at B0 != 0.

    Of a sharded model what PEFT saves is gathered, which takes every process; the base weights are not.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for name in state_dict:
        if "lora_" in name or "modules_to_save" in name:
            state_dict[name] = whole(state_dict[name])
    for path, layer in model.named_modules():
        if isinstance(layer, ConvertedLoraLinear):
            for adapter in layer.pairs:
                a, b, d_a, d_b = factor_keys(f"{path}.", adapter)
                deltas = state_dict.pop(d_a), state_dict.pop(d_b)
                state_dict[a], state_dict[b] = stacked(state_dict[a], state_dict[b], *deltas)
    return state_dict


@contextmanager
def folded_configs(model: PeftModel) -> Iterator[None]:
    """Let the model's configs be those that fit `folded_state_dict` while a block saves them."""
    configs: dict[str, Any] = model.peft_config
    own = dict(configs)
    configs.update({name: folded_config(model, name) for name in own})
    try:
        yield
    finally:
        configs.update(own)


def folded_config(model: PeftModel, adapter: str) -> LoraConfig:
    """The LoraConfig that fits `folded_state_dict`: rank and alpha of every layer as stored, scaling unchanged."""
    config: Any = copy.deepcopy(model.peft_config[adapter])
    sizes = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ConvertedLoraLinear) and adapter in layer.states:
            rank = layer.r[adapter] * (1 + (adapter in layer.pairs))
            sizes[base_name(path)] = rank, layer.scaling[adapter] * (rank**0.5 if config.use_rslora else rank)
    if not sizes:  # no layer of this adapter is converted: the config fits unchanged
        return config
    start = config.init_lora_weights
    with_sizes(config, sizes)
    if changes_base(start):  # linlora's readers refuse it by this
        config.init_lora_weights = start
    return config


def with_sizes(config: LoraConfig, sizes: dict[str, tuple[int, float]]) -> LoraConfig:
    """Give a LoraConfig the (rank, alpha) of every layer, the commonest as its own, and return it."""
    (config.r, config.lora_alpha), _ = Counter(sizes.values()).most_common(1)[0]
    # A key of PEFT's patterns also matches behind a dot, so '^' keeps 'fc' from being the 'fc' in a block.
    others = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != (config.r, config.lora_alpha)}
    config.rank_pattern = {name: rank for name, (rank, _) in others.items()}
    config.alpha_pattern = {name: alpha for name, (_, alpha) in others.items()}
    config.init_lora_weights = True
    return config
