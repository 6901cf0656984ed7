"""Which derivative machinery is at work around an op.

The fused autograd Functions declare no `jvp`: declaring one breaks fullgraph compilation, and a kernel launched
inside it would return a detached tangent. One rule for all ops and both directions: under a `torch.func` transform
(jvp, vjp, grad, vmap, any nesting) or a dual level of forward-mode AD no kernel is launched. A forward runs composed of
aten calls, which every transform differentiates exactly. So does a backward, of a graph that was recorded before the
transform too: its cotangent may be dual, or a batch of them. The ops of model scope, whose tangent is a constant by
design, refuse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transform_active() -> bool:
    """Whether a `torch.func` transform or a forward-mode level surrounds the call; torch.compile traces this."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at values: no device is waited for then, and no trace is broken."""
    return tensor.device.type == "cpu" and not (transform_active() or torch.compiler.is_compiling())


def refuse_transform(op: str) -> None:
    """Raise where an op whose tangent is a constant would be differentiated by another machinery than its own."""
    if transform_active():
        raise NotImplementedError(
            f"{op}: an op of model scope carries its own tangent and runs in no torch.func transform or dual level; "
            "transform a model of scope 'layer', or use linlora.functional.jvp and vjp of the whole model"
        )


def refuse_double_backward(op: str) -> None:
    """Raise when backward itself is being recorded: the fused backward has no graph, and silence would drop terms."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: the fused backward cannot be differentiated again (create_graph=True). "
            f"Nest torch.func.grad or torch.func.jvp around the op, or call linlora.reference.{op}."
        )


def intercepts(x: Tensor) -> bool:
    """Whether x is of a class that sees every torch function called on it, as that of linlora.stream does."""
    if type(x) is Tensor:
        return False
    own = getattr(type(x).__torch_function__, "__func__", None)  # none where a class switched it off
    return own not in (None, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]
