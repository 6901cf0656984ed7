"""Attention of inputs and cotangents in any layout, and at any scale: that of contiguous tensors, by the reference."""

import pytest
import torch

from linlora import functional, reference

ALONG = {"heads": 1, "queries": 2, "numbers": 3}


def transposed(x):
    return x.mT.contiguous().mT


def strided(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def expanded(dim):
    return lambda x: x.narrow(dim, 0, 1).expand(x.shape)


LAYOUTS = {"transposed": transposed, "strided": strided}
LAYOUTS |= {f"expanded over {name}": expanded(dim) for name, dim in ALONG.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_give_what_contiguous_tensors_give(layout, causal):
    q, k, v, q_tangent, g = (layout(torch.randn(2, 4, 5, 8, dtype=torch.float64)) for _ in range(5))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    o, o_tangent = functional.attention(*given, q_tangent, causal=causal)
    plain = [x.contiguous().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*plain, q_tangent.contiguous(), None, None, causal=causal, scale=8**-0.5)
    torch.testing.assert_close((o, o_tangent), tuple(expected))
    torch.testing.assert_close(torch.autograd.grad(o, given, g), torch.autograd.grad(expected[0], plain, g))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_causal_query_sees_no_later_key_at_any_scale(scale):
    q, k, v, v_tangent, g = torch.randn(5, 1, 2, 6, 8, dtype=torch.float64)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    outputs = functional.attention(*given, v_tangent=v_tangent, causal=True, scale=scale)
    expected = reference.attention(*given, None, None, v_tangent, causal=True, scale=scale)
    torch.testing.assert_close(outputs, tuple(expected))
    torch.testing.assert_close(torch.autograd.grad(outputs[0], given, g), torch.autograd.grad(expected[0], given, g))
