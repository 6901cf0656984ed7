"""How many tokens a model has positions for: the rows of its tables of positions, learned or fixed.

Models with relative or rotary positions have no such table, and no limit here. Those of images and sounds do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from linlora.training.checkpoints import quiet
from linlora.training.settings import Settings

_AT_ONCE = 1000
_OTHER = ("vision", "visual", "image", "audio")
_TABLES = ("wpe", "position_embedding", "position_embeddings", "positions_embed", "pos_emb", "embed_positions")


def positions(settings: Settings, auto: Any, config: Any) -> dict[str, int | None]:
    """The tokens that the "encoder" and the "decoder" of a model take, None where nothing limits them.

    A model that is only one of the two is both. It is made without memory, from its configuration.
    """
    trust = settings.model_options.get("trust_remote_code", False)
    with quiet(), torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust)
    found: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for name, table in [*model.named_modules(), *model.named_buffers()]:
        path = name.split(".")
        of_text = not any(word in part for word in _OTHER for part in path)
        if path[-1] in _TABLES and of_text and isinstance(table, (nn.Embedding, torch.Tensor)):
            sides = [side for side in found if config.is_encoder_decoder and side in path] or list(found)
            for side in sides:
                found[side].append(_rows(table))
    return {side: min(rows, default=None) for side, rows in found.items()}


def token_counts(tokenizer: Any, *texts: Sequence[str], **options: Any) -> list[int]:
    """The tokens of some texts (or pairs of texts), none of them cut."""
    counts: list[int] = []
    for start in range(0, len(texts[0]), _AT_ONCE):
        with quiet():  # transformers warns of long texts
            tokens = tokenizer(*(list(of[start : start + _AT_ONCE]) for of in texts), **options)
        counts += map(len, tokens["input_ids"])
    return counts


def _rows(table: nn.Embedding | torch.Tensor) -> int:
    """The positions of a table: the rows behind those for padding (RoBERTa) or a fixed offset (OPT, BART)."""
    if isinstance(table, torch.Tensor):
        return table.shape[0]
    before = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - max(before, getattr(table, "offset", 0))
