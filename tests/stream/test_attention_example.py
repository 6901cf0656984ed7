"""The attention layer of docs/forward_mode.md is that of torch.func.jvp, with the gradients through its tangent."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F

DOCUMENT = Path(__file__).parents[2] / "docs" / "forward_mode.md"


def test_the_layer_of_the_document_is_exact():
    example = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[-1]
    names = {}
    exec(example, names)
    layer, (x, x_tangent) = names["Attention"](16, heads=2).double(), torch.randn(2, 3, 5, 16, dtype=torch.float64)

    def plain(x):
        q, k, v = layer.split(layer.qkv(x))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return layer.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    gradients = []
    for y, y_tangent in (layer(x, x_tangent), torch.func.jvp(plain, (x,), (x_tangent,))):
        loss = (y.sin() + y_tangent.square()).sum()
        gradients.append([y, y_tangent, *torch.autograd.grad(loss, list(layer.parameters()))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
