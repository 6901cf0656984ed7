"""Rules of functions that are linear in each of their tensors: convolutions, einsum, resampling, padding, pooling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from linlora.stream.structural import linear_map
from linlora.stream.tensor import DualTensor, duals, primals, rule, wrap

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
    given = dict(zip(_PAD, args, strict=False)) | kwargs
    x, widths, mode, value = (given.get(name) for name in _PAD)
    if not isinstance(x, DualTensor):
        return DualTensor.rules[None](func, args, kwargs)
    y = func(primals(x), widths, mode or "constant", value)
    with torch.no_grad():
        return wrap(y, func(x.tangent, widths, mode or "constant"), x.stream)


_PAD = ("input", "pad", "mode", "value")


@rule(
    *(f"{adaptive}max_pool{n}d{indexed}" for adaptive in ("", "adaptive_") for n in (1, 2, 3)
      for indexed in ("", "_with_indices")),
)  # fmt: skip
def max_pool(func: Any, args: tuple, kwargs: dict) -> Any:
    """The maxima of the primal, and the tangents where they were found."""
    name = func.__name__.removesuffix("_with_indices")
    x, over, both = args[0], -int(name[-2]), name != func.__name__ or kwargs.get("return_indices", False)
    y, indices = getattr(functional, name)(x.primal, *args[1:], **{**kwargs, "return_indices": True})
    with torch.no_grad():
        y_tangent = x.tangent.flatten(over).gather(-1, indices.flatten(over)).view(indices.shape)
    return wrap((y, indices), [y_tangent, None], x.stream) if both else wrap(y, y_tangent, x.stream)


@rule("grid_sample")
def grid_sample(func: Any, args: tuple, kwargs: dict) -> Any:
    """Linear in the image; in the grid PyTorch has no derivative forward."""
    moves = next(duals((args[1:], kwargs)), None) is not None
    return DualTensor.rules[None](func, args, kwargs) if moves else linear_map(func, args, kwargs)


@rule("einsum")
def einsum(func: Any, args: tuple, kwargs: dict) -> Any:
    """Linear in each operand: a term for each that carries a tangent."""
    if kwargs or not isinstance(args[0], str):
        return DualTensor.rules[None](func, args, kwargs)
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
    names = ("input", "weight", "bias")
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    rest, options = primals(args[3:]), {name: value for name, value in kwargs.items() if name not in names}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    y = func(primals(x), primals(weight), primals(bias), *rest, **options)
    with torch.no_grad():
        terms = [func(*changed, None, *rest, **options) for changed in _one_by_one((x, weight))]
        if isinstance(bias, DualTensor):
            terms.append(bias.tangent.view(-1, *(1,) * (primals(weight).dim() - 2)).to(y.dtype))
        return wrap(y, _sum(terms), next(duals((x, weight, bias))).stream)


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
