"""A table of the torch functions that networks call: each is exact against torch.func.jvp, or refused by its name."""

import pytest
import torch
from function_table import REFUSED, TABLE, D
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from linlora.stream import DualTensor, Stream, TangentError


def run(function, x):
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(function(x)) if isinstance(leaf, Tensor)]


def real(x):
    return x.is_floating_point() or x.is_complex()


def test_the_table_is_long():
    assert len(TABLE) >= 200


@pytest.mark.parametrize("name", TABLE)
def test_a_function_is_exact_or_refused(name):
    torch.manual_seed(5)
    function = TABLE[name]
    x, x_tangent = torch.rand(3, 4, dtype=D) * 0.8 + 0.1, torch.randn(3, 4, dtype=D)
    if name in REFUSED:
        with pytest.raises(TangentError, match=name):
            run(function, DualTensor(x, x_tangent, Stream()))
        return
    expected = run(function, x)
    with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = run(function, torch.autograd.forward_ad.make_dual(x.clone(), x_tangent))
        tangents = [torch.autograd.forward_ad.unpack_dual(y).tangent if real(y) else None for y in outputs]
    actual = run(function, DualTensor(x, x_tangent, Stream()))
    assert len(actual) == len(expected)
    for y, y_tangent, plain in zip(actual, tangents, expected, strict=True):
        primal = y.primal if isinstance(y, DualTensor) else y
        torch.testing.assert_close(primal, plain, rtol=1e-12, atol=1e-12, equal_nan=True)
        if isinstance(y, DualTensor):
            assert (y.tangent.dtype, y.tangent.shape) == (plain.dtype, plain.shape)
        if real(plain):
            expected_tangent = torch.zeros_like(plain) if y_tangent is None else y_tangent
            tangent = y.tangent if isinstance(y, DualTensor) else torch.zeros_like(plain)
            torch.testing.assert_close(tangent, expected_tangent, rtol=1e-11, atol=1e-11, equal_nan=True)


EDGES = {
    "power zero": lambda x: x**0,
    "power one half": lambda x: x**0.5,
    "power of a power": lambda x: (x**2) ** 0.5,
    "negative power": lambda x: x**-1,
    "tensor power": lambda x: x ** torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=D),
    "float_power": lambda x: torch.float_power(x, 0),
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "log": torch.log,
    "reciprocal": torch.reciprocal,
    "division": lambda x: x / x,
    "norm": lambda x: x.mul(0.0).norm(),
    "vector norm": lambda x: torch.linalg.vector_norm(x * 0.0),
    "normalize": lambda x: F.normalize(x[None] * 0.0),
    "relu": F.relu,
    "abs": torch.abs,
    "where": lambda x: torch.where(x > 0, x.clamp(min=0.1).sqrt(), x.sqrt()),
    "softmax of a masked row": lambda x: x.masked_fill(torch.ones(4, dtype=torch.bool), -torch.inf).softmax(-1),
    "maximum of equals": lambda x: torch.maximum(x, x.new_zeros(4)),
    "max of equals": lambda x: (x * 0.0).max(),
    "xlogy": lambda x: torch.xlogy(x, x),
    "infinity": lambda x: (x / 0.0).sigmoid() * (x / 0.0).tanh(),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("still", [False, True])
def test_at_zero_and_at_infinity_a_tangent_is_what_torch_says(name, still):
    x = torch.tensor([0.0, -1.0, 2.0, torch.inf], dtype=D)
    x_tangent = torch.zeros(4, dtype=D) if still else torch.tensor([1.0, 0.0, -1.0, 1.0], dtype=D)
    y, y_tangent = torch.func.jvp(EDGES[name], (x,), (x_tangent,))
    actual = EDGES[name](DualTensor(x, x_tangent, Stream()))
    tangent = actual.tangent if isinstance(actual, DualTensor) else torch.zeros_like(y)
    torch.testing.assert_close(actual.primal if isinstance(actual, DualTensor) else actual, y, equal_nan=True)
    torch.testing.assert_close(tangent, y_tangent, equal_nan=True)
