"""linlora as functions: the ops, for layers of your own, and the products of a whole linearized network.

>>> import torch
>>> from linlora import functional as F
>>> x, W = torch.randn(8, 64), torch.randn(32, 64)
>>> A0, dA, B0, dB = torch.randn(4, 64), torch.randn(4, 64), torch.randn(32, 4), torch.randn(32, 4)
>>> y, y_tangent = F.lora_linear(x, W, None, A0, B0, dA, dB, 0.5)
>>> torch.allclose(y + y_tangent, F.linearized_lora_linear(x, W, None, A0, B0, dA, dB, 0.5), atol=1e-3)
True

Ops with tangents chain: a layer of LoRA projections and attention passes on (y, y_tangent), and its gradients are exact
through both. Here the queries, keys, values and the output of an attention layer are linearized together, at one point,
as model scope linearizes a network; the gradient of dB is that which torch.func gives of the tangent.

>>> class Attention(torch.nn.Module):
...     def __init__(self, width: int, heads: int, rank: int) -> None:
...         super().__init__()
...         self.heads = heads
...         for name, shape in {"W": (width, width), "A0": (rank, width), "B0": (width, rank)}.items():
...             self.register_buffer(name, torch.randn(4, *shape) / shape[1] ** 0.5)
...         self.dA = torch.nn.Parameter(torch.zeros(4, rank, width))
...         self.dB = torch.nn.Parameter(torch.zeros(4, width, rank))
...
...     def project(self, i, x, x_tangent):
...         return F.lora_linear(
...             x, self.W[i], None, self.A0[i], self.B0[i], self.dA[i], self.dB[i], 0.5, x_tangent
...         )
...
...     def forward(self, x, x_tangent=None):
...         def split(t):
...             return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
...         streams = [map(split, self.project(i, x, x_tangent)) for i in range(3)]
...         (q, k, v), (q_tangent, k_tangent, v_tangent) = zip(*streams)
...         o, o_tangent = F.attention(q, k, v, q_tangent, k_tangent, v_tangent, causal=True)
...         return self.project(3, o.transpose(1, 2).flatten(2), o_tangent.transpose(1, 2).flatten(2))
>>> layer, x = Attention(16, heads=2, rank=2), torch.randn(3, 5, 16)
>>> y, y_tangent = layer(x)
>>> (y + y_tangent).square().sum().backward()
>>> layer.dB.grad.flatten(1).norm(dim=1).gt(0).tolist()  # of q, k, v and the output
[True, True, True, True]
>>> def plain(B):
...     q, k, v = ((x @ layer.W[i].T + 0.5 * x @ layer.A0[i].T @ B[i].T).unflatten(-1, (2, -1)).transpose(1, 2)
...                for i in range(3))
...     S = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
...     o = (S.softmax(-1) @ v).transpose(1, 2).flatten(2)
...     return o @ layer.W[3].T + 0.5 * o @ layer.A0[3].T @ B[3].T
>>> def loss(dB):
...     return sum(torch.func.jvp(plain, (layer.B0,), (dB,))).square().sum()
>>> torch.allclose(layer.dB.grad, torch.func.grad(loss)(torch.zeros_like(layer.dB)), rtol=1e-3, atol=1e-3)
True
"""

from linlora.ops.attention import attention
from linlora.ops.grouped_lora_linear import grouped_lora_linear
from linlora.ops.grouping import Groups, unique_tasks
from linlora.ops.lora_linear import linearized_lora_linear, lora_linear
from linlora.ops.mix_inventories import mix_inventories
from linlora.ops.packed_attention import packed_attention
from linlora.ops.routed_lora_linear import routed_lora_linear
from linlora.stream.dual import dual
from linlora.vectors.products import jvp, vjp
from linlora.vectors.solve import Solution, solve

__all__ = [
    "Groups",
    "Solution",
    "attention",
    "dual",
    "grouped_lora_linear",
    "jvp",
    "linearized_lora_linear",
    "lora_linear",
    "mix_inventories",
    "packed_attention",
    "routed_lora_linear",
    "solve",
    "unique_tasks",
    "vjp",
]
