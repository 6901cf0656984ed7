"""Model scope's second stream: a (primal, tangent) pair that flows through unmodified transformers code.

    tensor        DualTensor, and how a torch function called on one finds its rule
    structural    views, indexing, casts, masks, concatenation: the same map on both streams
    arithmetic    sums, products and elementwise functions
    fused         the functions that have an op in linlora.ops.dual, and the losses
    normalization group and batch norm
    multilinear   convolutions, einsum, resampling, padding, pooling
    attention     attention in the forms that PyTorch has
    in_place      x += y and its kin, by their functional forms
    fallback      every other function: forward-mode AD of that one function, counted
    caller        the module and the function that a message names
    modules       modules that are fused as a whole, because they reach the stream in pieces
    head          where a stream ends: the model's outputs and the modules trained beside the adapter
    border        whether code runs in the network, in a hook of one of its modules, or outside
    outside       what a tensor of the stream is there: F = f + J δ, a plain tensor
    sharded       through modules sharded by FSDP2, whose hooks follow autograd
    forward       the stream of linlora.functional.dual: tangents of the inputs, parameters that train
    dual          linlora.functional.dual itself: checks, trees, and where its stream begins and ends

Inputs have no tangent. They stay plain tensors until the first adapter, whose layer returns the first DualTensor.
"""

from linlora.stream import (  # noqa: F401  they register their rules
    arithmetic,
    attention,
    fallback,
    fused,
    in_place,
    multilinear,
    normalization,
    outside,
    structural,
)
from linlora.stream.tensor import DualTensor, Stream, TangentError, collapse

__all__ = ["DualTensor", "Stream", "TangentError", "collapse"]
