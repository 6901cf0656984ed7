"""`dual` against torch.func.jvp in float64: outputs, tangents, and the gradients of the primal path."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from linlora.functional import dual


def assert_like_func(function, inputs, tangents, module=None, tolerance=1e-12):
    """The inputs are leaves that ask for a gradient or not; those of integers and without a tangent are closed over."""
    moved = [n for n, tangent in enumerate(tangents) if tangent is not None]

    def of_moved(*values):
        arguments = list(inputs)
        for n, value in zip(moved, values, strict=True):
            arguments[n] = value
        return function(*arguments)

    parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(
            lambda *values: tensors(of_moved(*values)),
            tuple(inputs[n].detach() for n in moved),
            tuple(tangents[n] for n in moved),
        )
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        plain = tensors(function(*inputs))
    torch.manual_seed(0)
    output, tangent = dual(function, tuple(inputs), tuple(tangents))
    for actual, wanted in ((output, expected[0]), (tangent, expected[1])):
        leaves_of = tensors(actual)
        assert len(leaves_of) == len(wanted)
        for x, y in zip(leaves_of, wanted, strict=True):
            assert type(x) is Tensor
            assert x.dtype == y.dtype
            torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)
    if parameters or leaves:
        cotangents = [torch.randn_like(y) for y in plain if y.requires_grad]
        gradients = [
            torch.autograd.grad(
                [y for y in outputs if y.requires_grad], [*parameters, *leaves], cotangents, allow_unused=True
            )
            for outputs in (tensors(output), plain)
        ]
        for x, y in zip(*gradients, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    return output, tangent


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def pair(*shape):
    return torch.randn(*shape or (3, 4), dtype=torch.float64), torch.randn(*shape or (3, 4), dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4)).double()


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width)])
        self.attention, self.condition = Attention(width, heads), nn.Linear(width, 6 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))

    def forward(self, x, condition):
        shift, scale, gate, shift2, scale2, gate2 = self.condition(nn.functional.silu(condition))[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norms[0](x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer of images (B, 2, 8, 8), two times and a class."""

    def __init__(self, width=16, heads=2, depth=2):
        super().__init__()
        self.embed, self.classes = nn.Conv2d(2, width, 2, 2), nn.Embedding(3, width)
        self.times = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 8)
        self.register_buffer("position", torch.randn(16, width))

    def forward(self, z, r, t, label):
        x = self.embed(z).flatten(2).transpose(1, 2) + self.position
        frequencies = torch.exp(-torch.arange(4, dtype=z.dtype))
        angles = torch.cat([(t[:, None] * frequencies).cos(), ((t - r)[:, None] * frequencies).sin()], -1)
        condition = self.times(angles) + self.classes(label)
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(self.norm(x)).view(-1, 4, 4, 2, 2, 2)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(z.shape)


def dit_step(seed=0, batch=3):
    """(network, inputs, tangents) of MeanFlow: the velocity in z, one in t."""
    torch.manual_seed(seed)
    z, v = torch.randn(2, batch, 2, 8, 8, dtype=torch.float64)
    r, t = torch.rand(2, batch, dtype=torch.float64)
    label = torch.arange(batch) % 3
    return DiT().double(), (z, r, t, label), (v, None, torch.ones_like(t), None)
