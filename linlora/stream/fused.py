"""Rules of the functions that have an op in `linlora.ops.dual`, of dropout, and of the losses."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from linlora.ops import dual
from linlora.ops.aten.activations import Kind
from linlora.stream.arithmetic import product, tangent
from linlora.stream.caller import where
from linlora.stream.evaluation import recording
from linlora.stream.fallback import forward_mode
from linlora.stream.tensor import ONE, TWO, DualTensor, TangentError, bound, collapse, duals, primals, rule, wrap

LOSSES = (
    "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
    "soft_margin_loss", "multilabel_soft_margin_loss", "multi_margin_loss", "multilabel_margin_loss",
    "margin_ranking_loss", "triplet_margin_loss", "hinge_embedding_loss", "cosine_embedding_loss",
)  # fmt: skip
LOSSES_OF_PROBABILITIES = ("nll_loss", "kl_div", "binary_cross_entropy", "ctc_loss", "poisson_nll_loss")


@rule("linear")
def linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = bound({**ONE, "weight": ..., "bias": None}, args, kwargs)
    if not isinstance(x, DualTensor) or _carry(weight, bias):
        return forward_mode(func, args, kwargs)
    check_frozen(func, weight, bias)
    return wrap(*dual.linear(x.primal, x.tangent, weight, bias), x.stream)


@rule("addmm")
def addmm(func: Any, args: tuple, kwargs: dict) -> Any:
    """bias + x W, as transformers' Conv1D writes a linear layer."""
    bias, x, weight = bound(ADDMM, args, kwargs)
    if not isinstance(x, DualTensor) or _carry(bias, weight) or bias.dim() != 1:
        return forward_mode(func, args, kwargs)
    return linear(functional.linear, (x, weight.t(), bias), {})


@rule("layer_norm")
def layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    x, shape, weight, bias, eps = bound(LAYER_NORM, args, kwargs)
    if len(shape) != 1 or not isinstance(x, DualTensor) or _carry(weight, bias):
        return forward_mode(func, args, kwargs)
    check_frozen(func, weight, bias)
    return wrap(*dual.layer_norm(x.primal, x.tangent, weight, bias, eps), x.stream)


@rule("rms_norm")
def rms_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    x, shape, weight, eps = bound(RMS_NORM, args, kwargs)
    if len(shape) != 1 or not isinstance(x, DualTensor) or _carry(weight):
        return forward_mode(func, args, kwargs)
    check_frozen(func, weight)
    return wrap(*dual.rms_norm(x.primal, x.tangent, weight, rms_eps(x.primal, eps)), x.stream)


class PendingActivation(DualTensor):
    """act(gate), not computed yet: if a product with `up` is next (SwiGLU, GeGLU), both run as one op."""

    gate: DualTensor
    kind: Kind
    grad_enabled: bool  # where the activation was called, which is where it belongs to autograd
    streams: list[Tensor] | None  # [primal, tangent], once computed

    @staticmethod
    def __new__(cls, gate: DualTensor, kind: Kind) -> PendingActivation:
        guard = gate.stream.guarded and gate.primal.requires_grad
        pending = Tensor._make_wrapper_subclass(
            cls, gate.shape, dtype=gate.dtype, device=gate.device, requires_grad=guard
        )
        # a DualTensor of its own, which x += y does not rebind before this is computed
        pending.gate = DualTensor(gate.primal, gate.tangent, gate.stream)
        pending.kind, pending.stream, pending.relatives = kind, gate.stream, []
        pending.grad_enabled, pending.streams = torch.is_grad_enabled(), None
        return pending

    @property
    def has_graph(self) -> bool:
        return self.gate.has_graph if self.streams is None else self.streams[0].requires_grad

    def _computed(self) -> list[Tensor]:
        if self.streams is None:
            with torch.set_grad_enabled(self.grad_enabled):
                self.streams = list(dual.activation(self.gate.primal, self.gate.tangent, self.kind))
            del self.gate
        return self.streams

    @property
    def primal(self) -> Tensor:
        return self._computed()[0]

    @primal.setter
    def primal(self, value: Tensor) -> None:
        self._computed()[0] = value

    @property
    def tangent(self) -> Tensor:
        return self._computed()[1]

    @tangent.setter
    def tangent(self, value: Tensor) -> None:
        self._computed()[1] = value


@rule("gelu", "silu", "relu")
def activation(func: Any, args: tuple, kwargs: dict) -> Any:
    return PendingActivation(*activated(func, args, kwargs))


def activated(func: Any, args: tuple, kwargs: dict) -> tuple[DualTensor, Kind]:
    """The argument of an activation, and its kind."""
    if func.__name__ != "gelu":
        return (*bound(ONE, args, kwargs), func.__name__)
    x, approximate = bound(ONE, args, kwargs, approximate="none")
    return x, "gelu_tanh" if approximate == "tanh" else "gelu"


@rule("mul", "__mul__", "__rmul__", "multiply")
def gated(func: Any, args: tuple, kwargs: dict) -> Any:
    for pending, up in permutations(bound(TWO, args, kwargs)):
        if isinstance(pending, PendingActivation) and pending.streams is None and isinstance(up, Tensor):
            gate = pending.gate
            if up is not pending and (primals(up).shape, primals(up).dtype) == (gate.primal.shape, gate.primal.dtype):
                outputs = dual.gated_activation(gate.primal, gate.tangent, primals(up), tangent(up), pending.kind)
                return wrap(*outputs, gate.stream)
    return product(func, args, kwargs)


@rule("dropout")
def dropout(func: Any, args: tuple, kwargs: dict) -> Any:
    """One mask for both streams."""
    kwargs = {"training" if name == "train" else name: value for name, value in kwargs.items()}  # torch.dropout's name
    x, p, training = bound(_DROPOUT, args, kwargs)
    if not training or p == 0.0:
        return x
    y, mask = torch.native_dropout(x.primal, p, True)
    with torch.no_grad():
        y_tangent = x.tangent * mask * (1.0 / (1.0 - p) if p < 1.0 else 0.0)
    return wrap(y, y_tangent, x.stream)


@rule(*LOSSES)
def loss(func: Any, args: tuple, kwargs: dict) -> Any:
    """A loss is a function of F, not linearized itself: the stream ends here."""
    return func(*collapse(args), **collapse(kwargs))


@rule(*LOSSES_OF_PROBABILITIES)
def loss_of_probabilities(func: Any, args: tuple, kwargs: dict) -> Any:
    raise TangentError(
        f"{where(func)}: takes (log) probabilities, but the linearized function is that of the logits, before the "
        "softmax; leave the labels out and compute this loss from the logits the model returns"
    )


ADDMM: dict[str, Any] = {**ONE, "mat1": ..., "mat2": ...}
LAYER_NORM = {**ONE, "normalized_shape": ..., "weight": None, "bias": None, "eps": 1e-5}
RMS_NORM = {**ONE, "normalized_shape": ..., "weight": None, "eps": None}
_DROPOUT = {**ONE, "p": 0.5, "training": True}


def rms_eps(x: Tensor, eps: float | None) -> float:
    """The eps of an RMS norm; without one torch takes that of the dtype it computes in, float32 for half precision."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps


def _carry(*arguments: Any) -> bool:
    """Whether one of these arguments carries a tangent."""
    return next(duals(arguments), None) is not None


def check_frozen(func: Any, *parameters: Tensor | None) -> None:
    """A parameter that trains beside the adapter would not get the gradient of the tangent."""
    records = torch.is_grad_enabled() and recording()
    if records and any(p is not None and p.requires_grad for p in parameters):
        raise TangentError(
            f"{where(func)}: a parameter of a function that the stream runs through asks for a gradient, but model "
            "scope linearizes in the adapter alone; freeze it, or name its module in modules_to_save"
        )
