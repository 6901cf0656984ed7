"""Rules of group norm, and of batch norm with the statistics of evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linlora.stream.fallback import forward_mode
from linlora.stream.tensor import ONE, DualTensor, bound, duals, rule, wrap


@rule("group_norm")
def group_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """y = w ⊙ x̂ + b,  y_t = w ⊙ J x_t,  J = ∂x̂/∂x, symmetric: aten's backward applies it."""
    x, groups, weight, bias, eps, _ = bound(_GROUP_NORM, args, kwargs)
    if isinstance(weight, DualTensor) or isinstance(bias, DualTensor) or not isinstance(x, DualTensor) or not x.numel():
        return forward_mode(func, args, kwargs)
    y = func(x.primal, *args[1:], **kwargs)
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        wide = torch.promote_types(y.dtype, torch.float32)
        primal, tangent = x.primal.to(wide).contiguous(), x.tangent.to(wide).contiguous()
        batch, channels = primal.shape[:2]
        variance, mean = torch.var_mean(primal.view(batch, groups, -1), -1, correction=0)
        y_tangent = torch.ops.aten.native_group_norm_backward.default(
            tangent, primal, mean, variance.add_(eps).rsqrt_(), None, batch, channels,
            primal[0, 0].numel(), groups, [True, False, False],
        )[0]  # fmt: skip
        return wrap(y, y_tangent if weight is None else y_tangent.mul_(_of_channels(weight, primal)), x.stream)


@rule("batch_norm")
def batch_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """With given statistics a map of each channel; in training a fallback, which updates them once."""
    x, mean, variance, weight, bias, training, _, eps = bound(_BATCH_NORM, args, kwargs)
    if training or not isinstance(x, DualTensor) or next(duals((mean, variance, weight, bias)), None) is not None:
        return forward_mode(func, args, kwargs)
    y = func(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        slope = (variance + eps).rsqrt_()
        return wrap(y, x.tangent * _of_channels(slope if weight is None else slope * weight, x.primal), x.stream)


DualTensor.rules[torch.batch_norm] = forward_mode  # which has another order of arguments
_GROUP_NORM = {**ONE, "num_groups": ..., "weight": None, "bias": None, "eps": 1e-5, "cudnn_enabled": True}
_BATCH_NORM: dict[str, Any] = {
    **ONE, "running_mean": ..., "running_var": ..., "weight": None, "bias": None, "training": False, "momentum": 0.1,
    "eps": 1e-5,
}  # fmt: skip


def _of_channels(x: Tensor, like: Tensor) -> Tensor:
    """A number a channel, in the shape that multiplies (batch, channels, ...)."""
    return x.view(-1, *(1,) * (like.dim() - 2))
