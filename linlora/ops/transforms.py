"""Which derivative machinery is at work around an op.

The fused autograd Functions declare no `jvp`: declaring one breaks fullgraph compilation, and a kernel launched
inside it would return a detached tangent. Under a `torch.func` transform (jvp, vjp, grad, vmap, any nesting) or a
dual level of forward-mode AD, the ops therefore run as the composition in `linlora.reference`, whose aten calls
every transform differentiates exactly.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transform_active() -> bool:
    """Whether a `torch.func` transform or a forward-mode level surrounds the call; torch.compile traces this."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_double_backward(op: str) -> None:
    """Raise when backward itself is being recorded: the fused backward has no graph, and silence would drop terms."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: the fused backward cannot be differentiated again (create_graph=True). "
            f"Nest torch.func.grad or torch.func.jvp around the op, or call linlora.reference.{op}."
        )
