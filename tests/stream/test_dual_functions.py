"""The table of torch functions through `dual`: exact, with the gradient of the primal, or refused."""

import pytest
import torch
from function_table import REFUSED, TABLE, D
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from linlora.functional import dual
from linlora.stream import TangentError

WITHOUT_BACKWARD = {"in-place chain", "scatter", "vander"}  # plain backward of the whole function raises
EXACT = [name for name in TABLE if name not in REFUSED]


def run(function, x):
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(function(x)) if isinstance(leaf, Tensor)]


def inputs():
    torch.manual_seed(5)
    return torch.rand(3, 4, dtype=D) * 0.8 + 0.1, torch.randn(3, 4, dtype=D)


@pytest.mark.parametrize("name", EXACT)
def test_a_function_is_exact(name):
    function, (x, x_tangent) = TABLE[name], inputs()
    weight = nn.Parameter(torch.ones((), dtype=D))
    expected = run(function, x * weight)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        moved = run(function, forward_ad.make_dual(x.clone(), x_tangent))
        tangents = [forward_ad.unpack_dual(y).tangent if differentiable(y) else None for y in moved]
    torch.manual_seed(0)
    actual, actual_tangents = (
        [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        for tree in dual(lambda x: function(x * weight), (x,), (x_tangent,))
    )
    for y, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12, equal_nan=True)
    for y_tangent, wanted in zip(actual_tangents, tangents, strict=True):
        wanted = torch.zeros_like(y_tangent) if wanted is None else wanted
        torch.testing.assert_close(y_tangent.detach(), wanted, rtol=1e-11, atol=1e-11, equal_nan=True)
    if name not in WITHOUT_BACKWARD:
        wanted = slope(expected, weight)
        torch.testing.assert_close(slope(actual, weight), wanted, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_function_without_a_derivative_is_refused_by_its_name(name):
    x, x_tangent = inputs()
    with pytest.raises(TangentError, match=name):
        dual(TABLE[name], (x,), (x_tangent,))


def differentiable(x):
    return x.is_floating_point() or x.is_complex()


def slope(outputs, weight):
    """The gradient of a weighted sum of all outputs in a number that is in all of them."""
    ends = [y for y in outputs if y.requires_grad]
    cotangents = [torch.linspace(0.5, 1.5, y.numel(), dtype=D).view(y.shape).to(y.dtype) for y in ends]
    gradient = torch.autograd.grad(ends, weight, cotangents, allow_unused=True)[0] if ends else None
    return torch.zeros((), dtype=D) if gradient is None else gradient
