"""The ops of model scope by themselves: the functions that providers compute on a `StreamData`.

primal alone    PyTorch's own function, the floor (for attention, the fastest SDPA there is)
both streams    linlora's op; `torch.func.jvp` of PyTorch's function; the jvp_flash_attention package
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import linlora
from linlora.ops import dual

from .data import StreamData
from .job import Layer

_EPS = 1e-6

# (case, *primals, *parameters) → y
_PRIMAL: dict[str, Callable[..., Tensor]] = {
    "linear": lambda case, x, weight, bias: functional.linear(x, weight, bias),
    "attention": lambda case, q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal),
    "layer_norm": lambda case, x, weight, bias: functional.layer_norm(x, x.shape[-1:], weight, bias, _EPS),
    "rms_norm": lambda case, x, weight: functional.rms_norm(x, x.shape[-1:], weight, _EPS),
    "activation": lambda case, x: functional.gelu(x),
    "gated_activation": lambda case, gate, up: functional.silu(gate) * up,
}

# (case, *primals, *tangents, *parameters) → (y, y_tangent)
_FUSED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "linear": lambda case, x, x_t, weight, bias: dual.linear(x, x_t, weight, bias),
    "attention": lambda case, q, k, v, q_t, k_t, v_t: dual.attention(q, k, v, q_t, k_t, v_t, causal=case.causal),
    "layer_norm": lambda case, x, x_t, weight, bias: dual.layer_norm(x, x_t, weight, bias, _EPS),
    "rms_norm": lambda case, x, x_t, weight: dual.rms_norm(x, x_t, weight, _EPS),
    "activation": lambda case, x, x_t: dual.activation(x, x_t, "gelu"),
    "gated_activation": lambda case, gate, up, gate_t, up_t: dual.gated_activation(gate, gate_t, up, up_t, "silu"),
}


def primal(data: StreamData) -> Layer:
    """The floor: PyTorch's function of the primals; the tangents are not looked at."""
    function, parameters, count = _PRIMAL[data.case.op], tuple(data.parameters.values()), len(data.primals)
    return _layer(data, lambda *streams: function(data.case, *streams[:count], *parameters))


def fused(data: StreamData) -> Layer:
    """linlora's op of both streams."""
    function, parameters = _FUSED[data.case.op], tuple(data.parameters.values())
    return _layer(data, lambda *streams: function(data.case, *streams, *parameters))


def functorch(data: StreamData) -> Layer:
    """`torch.func.jvp` of PyTorch's function; attention under MATH, the only backend with forward-mode AD."""
    function, parameters, count = _PRIMAL[data.case.op], tuple(data.parameters.values()), len(data.primals)

    def forward(*streams: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(
                lambda *primals: function(data.case, *primals, *parameters), streams[:count], streams[count:]
            )

    return _layer(data, forward)


def jvp_flash(data: StreamData) -> Layer:
    """Attention of the package jvp_flash_attention, by forward-mode AD as its README asks for."""
    from jvp_flash_attention.jvp_attention import JVPAttn  # Triton kernels: imported on a GPU only

    count = len(data.primals)

    def forward(*streams: Tensor) -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(streams[:count], streams[count:], strict=True)]
            return tuple(forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals, causal=data.case.causal)))

    return _layer(data, forward)


def reference(function: str, data: StreamData) -> dict[str, Tensor]:
    """y, y_tangent (unless the function is "frozen") and the gradients of y, in float64 on the torch backend."""
    primals = {name: x.detach().double().requires_grad_() for name, x in data.primals.items()}
    others = [x.double() for x in (*data.tangents, *data.parameters.values())]
    with linlora.use_backend("torch"):
        y, y_tangent = _FUSED[data.case.op](data.case, *primals.values(), *others)
    results = {"y": y} if function == "frozen" else {"y": y, "y_tangent": y_tangent}
    if data.case.phase != "forward":
        gradients = torch.autograd.grad(y, list(primals.values()), data.cotangents[0].double())
        results |= {f"grad_{name}": gradient for name, gradient in zip(primals, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def _layer(data: StreamData, forward: Callable[..., Any]) -> Layer:
    return Layer(forward, {}, list(data.parameters.values()))
