"""linlora as functions: the ops, for layers of your own, and the products of a whole linearized network.

>>> import torch
>>> from linlora import functional as F
>>> x, W = torch.randn(8, 64), torch.randn(32, 64)
>>> A0, dA, B0, dB = torch.randn(4, 64), torch.randn(4, 64), torch.randn(32, 4), torch.randn(32, 4)
>>> y, y_tangent = F.lora_linear(x, W, None, A0, B0, dA, dB, 0.5)
>>> torch.allclose(y + y_tangent, F.linearized_lora_linear(x, W, None, A0, B0, dA, dB, 0.5), atol=1e-3)
True
"""

from linlora.ops.attention import attention
from linlora.ops.grouped_lora_linear import grouped_lora_linear
from linlora.ops.grouping import Groups, unique_tasks
from linlora.ops.linearized_lora_linear import linearized_lora_linear
from linlora.ops.lora_linear import lora_linear
from linlora.ops.mix_inventories import mix_inventories
from linlora.ops.routed_lora_linear import routed_lora_linear
from linlora.products import jvp, vjp
from linlora.solve import Solution, solve

__all__ = [
    "Groups",
    "Solution",
    "attention",
    "grouped_lora_linear",
    "jvp",
    "linearized_lora_linear",
    "lora_linear",
    "mix_inventories",
    "routed_lora_linear",
    "solve",
    "unique_tasks",
    "vjp",
]
