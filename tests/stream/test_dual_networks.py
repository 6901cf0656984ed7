"""Networks that people train by forward mode, and others, through `dual` against torch.func.jvp in float64."""

import math

import pytest
import torch
import transformers
from forward_oracle import Block, assert_like_func, dit_step
from torch import nn
from torch.nn import functional as F

from linlora.functional import dual
from linlora.stream import DualTensor

D = torch.float64
LONG = torch.int64


class UNet(nn.Module):
    """Two resolutions of residual blocks with group norm, attention in the middle, a skip connection."""

    def __init__(self, width=8):
        super().__init__()
        self.enter, self.time = nn.Conv2d(2, width, 3, padding=1), nn.Linear(1, width)
        self.norms = nn.ModuleList([nn.GroupNorm(2, width) for _ in range(3)])
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.down, self.up = nn.Conv2d(width, width, 3, 2, 1), nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.middle = nn.MultiheadAttention(width, 2, batch_first=True)
        self.leave = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x, t):
        x = self.enter(x)
        skip = x + self.convolutions[0](F.silu(self.norms[0](x))) + self.time(t)[:, :, None, None]
        x = F.avg_pool2d(self.down(F.silu(self.norms[1](skip))), 2)
        tokens = self.norms[2](x).flatten(2).mT
        x = x + self.middle(tokens, tokens, tokens, need_weights=False)[0].mT.view(x.shape)
        x = F.interpolate(self.convolutions[1](F.mish(x)), scale_factor=2.0, mode="nearest")
        return self.leave(torch.cat([self.up(x), skip], 1))


class ConvNeXt(nn.Module):
    """A block with depthwise convolution and global response normalization, between channels first and last."""

    def __init__(self, width=6):
        super().__init__()
        self.enter, self.depthwise = nn.Conv2d(2, width, 2, 2), nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.widen, self.narrow = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.gamma, self.head = nn.Parameter(torch.rand(12)), nn.Linear(width, 3)

    def forward(self, x):
        y = self.enter(x)
        z = F.gelu(self.widen(self.norm(self.depthwise(F.pad(y, (1, 1, 1, 1)))[..., 1:-1, 1:-1].permute(0, 2, 3, 1))))
        energy = z.norm(p=2, dim=(1, 2), keepdim=True)
        z = z + self.gamma * z * energy / (energy.mean(-1, keepdim=True) + 1e-6)
        return self.head((y + self.narrow(z).permute(0, 3, 1, 2)).mean((2, 3)))


class Wan(nn.Module):
    """Video tokens with rotary embeddings in complex numbers, written into halves, and RMS norm of queries and keys."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(2, 3 * width), nn.Linear(width, 2)
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        angles = torch.outer(torch.arange(12.0), 1e2 ** -torch.linspace(0, 1, width // heads // 2)).double()
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def rotate(self, x):
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.rotation
        y = torch.empty_like(x)
        y[..., 0::2], y[..., 1::2] = turned.real, turned.imag
        return y.type_as(x)

    def forward(self, x, t):
        q, k, v = self.qkv(x.flatten(2).mT * (1 + t[:, None])).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.norms[0](q), self.norms[1](k), v))
        o = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.out(o.transpose(1, 2).flatten(2))


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(30.0 * layer(x))
        return self.layers[-1](x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.head = kind(3, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        y, state = self.net(x)
        return self.head(y), state


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)])

    def forward(self, x):
        h, c, g, r = None, None, None, None
        for step in x.unbind(1):
            h, c = self.cells[0](step, None if h is None else (h, c))
            g = self.cells[1](h, g)
            r = self.cells[2](g, r)
        return h, c, r


class Biased(nn.Module):
    """Attention with a learned bias of positions, as Swin and T5 have it, over padded sequences."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(4, 24), nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x, lengths):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        padding = torch.where(torch.arange(6) < lengths[:, None, None, None], 0.0, -math.inf).to(x.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias + padding)


class Padded(nn.Module):
    """Queries over keys of another number, with grouped heads and a mask of booleans, one row of which is empty."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(4, 16), nn.Linear(4, 8)

    def forward(self, x, context, seen):
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, 1, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True, scale=0.4)


def randn(*shape):
    return torch.randn(*shape, dtype=D)


def norms(x):
    return torch.stack([y.norm() for y in x])


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    net = transformers.GPT2LMHeadModel(config)
    return net, lambda x: net(inputs_embeds=x, use_cache=False, labels=torch.arange(10).view(2, 5)), (randn(2, 5, 16),)


def llama(attention):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20, attn_implementation=attention,
    )  # fmt: skip
    net = transformers.LlamaModel(config)
    return net, lambda x: net(inputs_embeds=x, use_cache=False)[0], (randn(2, 5, 16),)


def of_module(net, *inputs):
    return net, net, inputs


def encoder(norm_first):
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)


def sit():
    net, (z, _, t, label), _ = dit_step()
    return net, lambda z, t: net(z, t, t, label), (z, t)


SEEN = torch.tensor([[[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]] * 2).bool()
NETWORKS = {
    "U-Net with attention": lambda: of_module(UNet(), randn(2, 2, 8, 8), randn(2, 1)),
    "ConvNeXt": lambda: of_module(ConvNeXt(), randn(2, 2, 8, 8)),
    "Wan with complex rotary embeddings": lambda: of_module(Wan(), randn(2, 2, 3, 4), randn(2, 1)),
    "SIREN": lambda: of_module(Siren(), randn(7, 2)),
    "GRU": lambda: of_module(Recurrent(nn.GRU), randn(2, 4, 3)),
    "LSTM": lambda: of_module(Recurrent(nn.LSTM), randn(2, 4, 3)),
    "RNN": lambda: of_module(Recurrent(nn.RNN), randn(2, 4, 3)),
    "cells": lambda: of_module(Cells(), randn(2, 4, 3)),
    "TransformerEncoderLayer": lambda: of_module(encoder(False), randn(2, 5, 8)),
    "TransformerEncoder with padding": lambda: _padded_encoder(),
    "Transformer": lambda: of_module(
        nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), randn(2, 5, 8), randn(2, 3, 8)
    ),
    "a learned bias of attention": lambda: of_module(Biased(), randn(2, 6, 4), torch.tensor([6, 3])),
    "grouped heads and a mask": lambda: of_module(Padded(), randn(2, 3, 4), randn(2, 5, 4), SEEN),
    "GPT-2 with its loss": gpt2,
    "Llama": lambda: llama("sdpa"),
    "eager Llama": lambda: llama("eager"),
    "batch norm": lambda: of_module(
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.ELU()), randn(4, 2, 6)
    ),
    "SiT": sit,
}  # fmt: skip


def _padded_encoder():
    net = nn.TransformerEncoder(encoder(True), 2, enable_nested_tensor=False)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return net, lambda x: net(x, src_key_padding_mask=padding), (randn(2, 5, 8),)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_exact(name, training):
    torch.manual_seed(0)
    net, function, inputs = NETWORKS[name]()
    net = net.double().train(training)
    tangents = [torch.randn_like(x) if x.is_floating_point() else None for x in inputs]
    tolerance = 1e-6 if "Llama" in name else 1e-12  # which computes its norms and angles in float32
    assert_like_func(function, inputs, tangents, net, tolerance)


def test_single_precision_on_a_cpu_takes_the_tangent_of_an_lstm():
    net = Recurrent(nn.LSTM)
    x, v = torch.randn(2, 2, 4, 3)
    (y, _), (y_tangent, _) = dual(net, (x,), (v,))
    double = Recurrent(nn.LSTM).double()
    double.load_state_dict(net.state_dict())
    (_, _), (expected, _) = dual(double, (x.double(),), (v.double(),))
    torch.testing.assert_close(y, net(x)[0])
    torch.testing.assert_close(y_tangent.detach(), expected.detach().float(), rtol=1e-4, atol=1e-5)


def test_no_function_of_these_networks_runs_in_forward_mode(monkeypatch):

    def refuse(func, args, kwargs):
        raise AssertionError(func)

    monkeypatch.setitem(DualTensor.rules, None, refuse)
    for name in ("U-Net with attention", "Wan with complex rotary embeddings", "SIREN", "Transformer", "SiT"):
        net, function, inputs = NETWORKS[name]()
        dual(
            function, tuple(x.double() for x in inputs), tuple(torch.randn_like(x) for x in inputs)
        ) if net.double() else None


def test_a_block_keeps_for_backward_what_the_plain_block_keeps():
    torch.manual_seed(0)
    block, x, c = Block(32, 2), torch.randn(2, 64, 32), torch.randn(2, 32)

    def kept(run):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t, lambda t: t
        ):
            output = run()
        sizes = [storage.nbytes() for storage in storages.values()]
        del output
        return sum(sizes)

    plain = kept(lambda: block(x, c))
    assert kept(lambda: dual(block, (x, c), (torch.randn_like(x), torch.randn_like(c)))) <= 1.15 * plain
