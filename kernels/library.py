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
from .problem import FactorGradients, LoraLinear, Result, empty, numbers_of, pack, present, restored, schema, unpack


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


def fake(kind: type, options: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """The fake function of such an operator: empty tensors for what the problem says it returns."""

    def run(tensors: list[Tensor | None], *rest: Any) -> list[Tensor]:
        problem, chosen = unpacked(kind, options, tensors, rest)
        like = next(tensor for tensor in tensors if tensor is not None)
        return present(empty(problem.outputs(**chosen), like))

    return run


def unpacked(kind: type, options: dict[str, Any], tensors: list[Tensor | None], rest: Any) -> tuple[Any, dict[str, Any]]:
    """The problem of an operator's arguments, and the options by name."""
    count = len(numbers_of(kind))
    return unpack(kind, tensors, rest[:count]), dict(zip(options, rest[count:], strict=True))


def _lora_linear(problem: LoraLinear, save: bool = True, primal: bool = True, config: Config | None = None) -> Result:
    run = _two_streams.host if problem.two_streams else _one_stream.host
    return run(problem, save=save, primal=primal, config=config)


lora_linear = operator("lora_linear", LoraLinear, _lora_linear, save=True, primal=True)
factor_gradients = operator("factor_gradients", FactorGradients, _factor_gradients.host)
