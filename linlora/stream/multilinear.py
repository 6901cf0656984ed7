"""Rules of functions that are linear in each of their tensors: convolutions, einsum, resampling, padding, pooling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from linlora.stream.arithmetic import tangent
from linlora.stream.fallback import forward_mode
from linlora.stream.structural import linear_map
from linlora.stream.tensor import ONE, DualTensor, bound, duals, primals, rule, wrap

_LINEAR = (
    "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "fold", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn", "fftshift",
    "ifftshift",
)  # fmt: skip

rule(*_LINEAR)(linear_map)


@rule("pad")
def pad(func: Any, args: tuple, kwargs: dict) -> Any:
    """Around the tangent are zeros, whatever the constant around the primal."""
    x, widths, mode, value = bound({**ONE, "pad": ..., "mode": "constant", "value": None}, args, kwargs)
    if not isinstance(x, DualTensor):
        return forward_mode(func, args, kwargs)
    y = func(x.primal, widths, mode, value)
    with torch.no_grad():
        return wrap(y, func(x.tangent, widths, mode), x.stream)


@rule(
    *(f"{adaptive}max_pool{n}d{indexed}" for adaptive in ("", "adaptive_") for n in (1, 2, 3)
      for indexed in ("", "_with_indices")),
)  # fmt: skip
def max_pool(func: Any, args: tuple, kwargs: dict) -> Any:
    """The maxima of the primal, and the tangents where they were found."""
    name = func.__name__.removesuffix("_with_indices")
    x, *options, both = bound(_ADAPTIVE_POOL if "adaptive" in name else _POOL, args, kwargs)
    over, both = -int(name[-2]), both or name != func.__name__ or func in _ALWAYS_BOTH
    y, indices = getattr(functional, name)(x.primal, *options, return_indices=True)
    with torch.no_grad():
        y_tangent = x.tangent.flatten(over).gather(-1, indices.flatten(over)).view(indices.shape)
    return wrap((y, indices), [y_tangent, None], x.stream) if both else wrap(y, y_tangent, x.stream)


_POOL: dict[str, Any] = {
    **ONE, "kernel_size": ..., "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip
_ADAPTIVE_POOL = {**ONE, "output_size": ..., "return_indices": False}
_ALWAYS_BOTH = {torch.adaptive_max_pool1d, torch._C._nn.adaptive_max_pool2d, torch._C._nn.adaptive_max_pool3d}
"""The functions that give indices unasked."""


@rule("grid_sample")
def grid_sample(func: Any, args: tuple, kwargs: dict) -> Any:
    """Linear in the image; in the grid PyTorch has no derivative forward."""
    moves = next(duals((args[1:], kwargs)), None) is not None
    return forward_mode(func, args, kwargs) if moves else linear_map(func, args, kwargs)


@rule("einsum")
def einsum(func: Any, args: tuple, kwargs: dict) -> Any:
    """Linear in each operand: a term for each that carries a tangent."""
    if kwargs or not isinstance(args[0], str):
        return forward_mode(func, args, kwargs)
    equation, operands = args[0], args[1:]
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    y = func(equation, *primals(operands))
    with torch.no_grad():
        terms = [func(equation, *changed) for changed in _one_by_one(operands)]
        return wrap(y, _sum(terms), next(duals(operands)).stream)


@rule(
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
def affine(func: Any, args: tuple, kwargs: dict) -> Any:
    """func(x, W, bias, ...), linear in x and in W, plus a bias for each output channel."""
    x, weight, bias = bound(AFFINE, args[:3], {name: value for name, value in kwargs.items() if name in AFFINE})
    rest, options = primals(args[3:]), {name: value for name, value in kwargs.items() if name not in AFFINE}
    y = func(primals(x), primals(weight), primals(bias), *rest, **options)
    with torch.no_grad():
        changed = list(_one_by_one((x, weight))) or [(torch.zeros_like(primals(x)), primals(weight))]
        biases = [tangent(bias), *[None] * (len(changed) - 1)]  # added once
        terms = [func(*pair, b, *rest, **options) for pair, b in zip(changed, biases, strict=True)]
        return wrap(y, _sum(terms), next(duals((x, weight, bias))).stream)


AFFINE: dict[str, Any] = {**ONE, "weight": ..., "bias": None}


def _one_by_one(operands: tuple) -> Iterator[tuple]:
    """The primals of some operands, with one tangent in the place of its primal, for each that there is."""
    for n, operand in enumerate(operands):
        if isinstance(operand, DualTensor):
            yield (*primals(operands[:n]), operand.tangent, *primals(operands[n + 1 :]))


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
