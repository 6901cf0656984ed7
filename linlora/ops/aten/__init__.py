"""The `torch` backend: every primitive of linlora composed of aten calls.

Every backend offers the same functions, and the autograd Functions of `linlora.ops` are written against them once.
"""

from linlora.ops.aten.activations import activation, activation_backward, gated_activation, gated_activation_backward
from linlora.ops.aten.attention import attention, attention_backward
from linlora.ops.aten.dropout import drawn_seed, dropout, mask, with_mask
from linlora.ops.aten.grouping import group_rows
from linlora.ops.aten.linear import linear
from linlora.ops.aten.lora import (
    c_of,
    factor_gradients,
    folding_pays,
    kept_factors,
    lora_linear,
    low_rank,
)
from linlora.ops.aten.mixing import mix_inventories, unmix_inventories
from linlora.ops.aten.norms import norm, norm_backward
from linlora.ops.aten.routed import grouped_gradients, grouped_lora_linear, grouped_shrink, place
