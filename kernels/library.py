"""The kernels as PyTorch custom operators, so that torch.compile sees each as one opaque call.

An operator costs a dispatch, so eager calls go straight to the host function: `operator` makes functions that choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import factor_gradients as _factor_gradients
from . import lora_linear as _lora_linear
from .counters import for_compiled_code
from .packing import fake, pack, present, restored, schema, unpacked
from .problem import FactorGradients, LoraLinear


def operator(
    name: str, kind: type, host: Callable[..., Any], of_launch: Mapping[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`host(problem, **options)` as a function that torch.compile sees as the operator `linlora::<name>`.

    `kind` is the packable class of the problem, `options` are the defaults of what else is asked for, `of_launch` of
    what the results do not depend on. Schema and fake function follow from the problem.
    """

    given = options | dict(of_launch or {})

    def run(tensors: list[Tensor | None], *rest: Any) -> list[Tensor]:
        problem, chosen = unpacked(kind, given, tensors, rest)
        with for_compiled_code():
            return present(host(problem, **chosen))

    def call(problem: Any, **chosen: Any) -> Any:
        if not torch.compiler.is_compiling():
            return host(problem, **chosen)
        tensors, numbers = pack(problem)
        chosen = given | chosen
        outputs = problem.outputs(**{option: chosen[option] for option in options})
        return restored(outputs, opaque(tensors, *numbers, *chosen.values()))

    def fake_run(tensors: list[Tensor | None], *rest: Any) -> list[Tensor]:
        return fake(kind, options)(tensors, *rest[: len(rest) - len(given) + len(options)])

    opaque = torch.library.custom_op(f"linlora::{name}", run, mutates_args=(), schema=schema(kind, given))
    opaque.register_fake(fake_run)
    return call


lora_linear = operator("lora_linear", LoraLinear, _lora_linear.host, {"change": ""}, save=True, primal=True)
factor_gradients = operator("factor_gradients", FactorGradients, _factor_gradients.host)
