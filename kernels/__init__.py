"""Triton kernels of linlora: one launch an op, on contiguous or strided matrices of fp32, fp16 or bf16.

The ops, each in the file of its name or of its family, which opens with its formula, tile picture and floor:

    lora_linear                     one LoRA layer with its tangent, in one stream or two, forward and backward
    linearized_lora_linear_flags      one stream beyond small M: persistent programs that share x Aᵀ through flags
    factor_gradients                the gradients of both factors
    grouped_lora_linear             a LoRA layer with factors of its own for every group of rows, one stream or both
    grouped_shrink                  its products of rank r
    grouped_gradients               the gradients of every group's factors
    mix_inventories                 the factors of every task in every layer from inventories of skills, and the adjoint
    linear                          primal and tangent streams of one frozen linear layer
    norm                            both streams of a layer or RMS norm, and the backward of the primal (norms)
    attention                       both streams of softmax attention
    attention_backward              the gradients of its primal; what the two share is in attention_tiles
    activation, gated_activation    both streams of gelu, silu or relu, and the backward of the primal (activations)

What they stand on, from the bottom:

    problem     what an op is given: one NamedTuple from the layer to the launch; also attention_problem,
                grouped_problem and norm_problem
    packing     problems and results as lists, for autograd and operators
    device      what can run where            checks      what the kernels serve, stated once
    dropout     the mask, bit for bit         configs     the table of tile sizes, and the function that picks
    tiles       loads, dots, low-rank steps   launch      from tensors to a launch, for running and for `aot`
    neighbours  rows of the table, changed in one number, that tuning times beside them
    stacks      rows in groups                pointers    tables of addresses
    uploads     numbers of the host, pinned   repeated    launches of which only addresses change
    counters    zeroed int32 buffers          library     the ops as PyTorch operators, opaque to torch.compile
    aot         compiles every row of the table for every architecture and reads the machine code
    aot_cases   the variants of every op that it compiles
    hub         writes the layout of Hugging Face's `kernels`

CONTRIBUTING.md says how an op is added. Tests run on CPU in the Triton interpreter (TRITON_INTERPRET=1), and
`python -m linlora.kernels.aot` needs no GPU either.

Importing this package needs neither a GPU nor Triton; `availability` says whether the kernels can run, and why not.
"""

from __future__ import annotations

import importlib.util
from typing import NoReturn

import torch

_MISSING = "Triton is not installed; install triton>=3.6 (Linux), or use the torch backend"

# transformers looks for the PyPI package "kernels". With the root of this repository on sys.path it finds this folder,
# which then has to import without linlora.
if __name__ == "linlora.kernels" and importlib.util.find_spec("triton") is not None:
    from .activations import activation, activation_backward, gated_activation, gated_activation_backward
    from .attention import attention
    from .attention_backward import attention_backward
    from .device import unavailable as _unavailable
    from .grouped_gradients import grouped_gradients
    from .grouped_lora_linear import grouped_lora_linear, place
    from .grouped_shrink import grouped_shrink
    from .library import factor_gradients, lora_linear
    from .linear import linear
    from .mix_inventories import mix_inventories, unmix_inventories
    from .norms import norm, norm_backward
    from .stacks import group_rows

else:

    def _unavailable(device: torch.device) -> str | None:  # type: ignore[misc]
        return _MISSING

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(f"{__name__}.{name}: the Triton kernels cannot run: {_MISSING}")


def availability(device: torch.device | str) -> str | None:
    """None when the kernels run on tensors of this device; otherwise the reason, with the remedy.

    >>> availability("meta") is None
    False
    """
    return _unavailable(torch.device(device))
