"""Modules that run whole, as one op: their forward would reach the stream in pieces (pow, mean, rsqrt, mul).

Like a LoRA layer, a module is converted by a change of its class. That it computes what its name says is checked: the
op and the module are compared on random input, and a module that differs is left alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from linlora.ops import dual
from linlora.stream.fused import PendingActivation, check_frozen
from linlora.stream.tensor import DualTensor, Stream


class Whole(nn.Module):
    """Mixed into the class of a module: a stream takes the op, a plain tensor the module's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, DualTensor) and not x.constant and not args and not kwargs:
            return self.both_streams(self, x)
        return super().forward(x, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its two parents: its class has no name to be found by."""
        return _empty, type(self).__bases__, super().__reduce_ex__(2)[2]

    @staticmethod
    def both_streams(module: Any, x: DualTensor) -> DualTensor:
        raise NotImplementedError


class WholeRMSNorm(Whole):
    """LlamaRMSNorm, Qwen2RMSNorm, T5LayerNorm, ...: y = w ⊙ x / sqrt(mean(x²) + eps)."""

    @staticmethod
    def both_streams(module: Any, x: DualTensor) -> DualTensor:
        check_frozen(None, module.weight)
        y, y_tangent = dual.rms_norm(x.primal, x.tangent, module.weight, module.variance_epsilon)
        dtype = torch.promote_types(x.dtype, module.weight.dtype)
        return DualTensor(y.to(dtype), y_tangent.to(dtype), x.stream)


class WholeGeluTanh(Whole):
    """NewGELUActivation: gelu by tanh, written out."""

    @staticmethod
    def both_streams(module: Any, x: DualTensor) -> DualTensor:
        return PendingActivation(x, "gelu_tanh")


class WholeQuantizedLinear(Whole):
    """A linear layer quantized by bitsandbytes or torchao: y = base(x), y_t = base(x_t) without its bias."""

    @staticmethod
    def both_streams(module: Any, x: DualTensor) -> DualTensor:
        # forward, because hooks have run for the call that led here
        return DualTensor(module.forward(x.primal), linear_part(module, x.tangent), x.stream)


def linear_part(module: nn.Module, x: Tensor) -> Tensor:
    """An affine module without its bias and its hooks, as a constant to autograd; to subtract the bias would round."""
    bias = module._parameters.get("bias")
    module._parameters["bias"] = None
    try:
        with torch.no_grad():
            return module.forward(x)
    finally:
        module._parameters["bias"] = bias


def quantized_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer quantized by bitsandbytes or torchao."""
    if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
        return type(module).__module__.startswith("bitsandbytes.")
    return isinstance(module, nn.Linear) and type(module.weight.data).__module__.startswith("torchao.")


def convert_modules(model: nn.Module) -> list[str]:
    """Fuse, in place, every module this file knows; returns their names."""
    converted = []
    for name, module in model.named_modules():
        mixin = _mixin(module)
        if name.endswith(".base_layer"):  # its LoRA layer takes the stream
            continue
        if mixin is not None and not isinstance(module, Whole) and _agrees(module, mixin):
            module.__class__ = _class(mixin, type(module))  # type: ignore[arg-type]
            converted.append(name)
    return converted


def restore_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Whole):
            module.__class__ = type(module).__bases__[1]


def _mixin(module: nn.Module) -> type[Whole] | None:
    if quantized_linear(module):
        return WholeQuantizedLinear
    name = type(module).__name__
    if name.endswith("RMSNorm") or name == "T5LayerNorm":
        return WholeRMSNorm if hasattr(module, "weight") and hasattr(module, "variance_epsilon") else None
    return WholeGeluTanh if name == "NewGELUActivation" else None


@functools.cache
def _class(mixin: Any, base: Any) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})


def _empty(mixin: Any, base: Any) -> Any:
    made = _class(mixin, base)
    return made.__new__(made)


def _agrees(module: Any, mixin: type[Whole]) -> bool:
    """Whether the op computes the module's function; a module that is called itself, on both streams, does."""
    if mixin is WholeQuantizedLinear:
        return True
    weight = getattr(module, "weight", None)
    like = torch.empty(0) if weight is None else weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8 if weight is None else weight.shape[0], generator=generator).to(like.device, like.dtype)
    with torch.no_grad():
        expected = module.forward(x).float()  # without its hooks, which are for the user's calls
        y = mixin.both_streams(module, DualTensor(x, torch.zeros_like(x), Stream())).primal.float()
    return bool((y - expected).norm() <= 1e-2 * expected.norm())
