"""The network of all tasks: the pre-trained ViT and one frozen head a question, which every domain shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTModel
from transformers.modeling_outputs import ImageClassifierOutput

NO_LABEL = -1e4  # the logit of a label that a question does not have


class Reader(nn.Module):
    """Answers each image's question. The heads are buffers, fitted on upright digits: what adapts is the ViT alone.

    Args:
        vit: the backbone.
        heads: nn.Linear by question; question i of `question_ids` is the i-th of them.
    """

    main_input_name = "pixel_values"
    weight: Tensor
    bias: Tensor

    def __init__(self, vit: ViTModel, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.vit = vit
        labels = max(head.out_features for head in heads.values())
        weight = vit.layernorm.weight.new_zeros(len(heads), labels, vit.config.hidden_size)
        bias = weight.new_full((len(heads), labels), NO_LABEL)
        for i, head in enumerate(heads.values()):
            weight[i, : head.out_features] = head.weight.detach()
            bias[i, : head.out_features] = head.bias.detach()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, pixel_values: Tensor, question_ids: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutput:
        """The logits (n, labels) of images (n, 1, 8, 8), and the mean loss where labels are given."""
        features = self.vit(pixel_values=pixel_values).last_hidden_state[:, 0]
        logits = torch.bmm(features.unsqueeze(1), self.weight[question_ids].mT).squeeze(1) + self.bias[question_ids]
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)
