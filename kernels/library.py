"""The kernels as PyTorch custom operators, so that torch.compile sees each as one opaque call.

An operator costs a dispatch, so eager calls go straight to the host function: `operator` makes functions that choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import factor_gradients as _factor_gradients
from . import linearized_lora_linear as _one_stream
from . import lora_linear as _two_streams
from .configs import Config
from .counters import for_compiled_code
from .packing import fake, pack, present, restored, schema, unpacked
from .problem import FactorGradients, LoraLinear, Result


def operator(name: str, kind: type, host: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`host(problem, **options)` as a function that torch.compile sees as the operator `linlora::<name>`.

    `kind` is the packable class of the problem, `options` are the defaults of what else is asked for. Schema and fake
    function follow from the problem.
    """

    def run(tensors: list[Tensor | None], *rest: Any) -> list[Tensor]:
        problem, chosen = unpacked(kind, options, tensors, rest)
        with for_compiled_code():
            return present(host(problem, **chosen))

    def call(problem: Any, **chosen: Any) -> Any:
        if not torch.compiler.is_compiling():
            return host(problem, **chosen)
        tensors, numbers = pack(problem)
        chosen = options | chosen
        return restored(problem.outputs(**chosen), opaque(tensors, *numbers, *chosen.values()))

    opaque = torch.library.custom_op(f"linlora::{name}", run, mutates_args=(), schema=schema(kind, options))
    opaque.register_fake(fake(kind, options))
    return call


def _lora_linear(problem: LoraLinear, save: bool = True, primal: bool = True, config: Config | None = None) -> Result:
    run = _two_streams.host if problem.two_streams else _one_stream.host
    return run(problem, save=save, primal=primal, config=config)


lora_linear = operator("lora_linear", LoraLinear, _lora_linear, save=True, primal=True)
factor_gradients = operator("factor_gradients", FactorGradients, _factor_gradients.host)
