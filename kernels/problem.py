"""Problems: what an op is given, as one object from the layer to the launch.

`LoraLinear` mirrors `LoraLinear` of csrc/lora_linear.h. A problem is a NamedTuple, so it costs what a tuple costs, and
it carries all that anybody has to know of its op:

    check()        the only check of its arguments
    adjoint()      the problem whose outputs are the gradients of its inputs
    outputs()      the shapes of its results, from which hosts allocate and fake functions follow

It travels whole: layer → op → `backend.lora_linear(problem)` → host → `launch(problem, result, config)`. It is taken
apart at two borders only. `Function.apply(backend, ..., *problem)` is the first: autograd wants every tensor by itself,
and a tuple spreads; `ctx.needs_input_grad` and the gradients that backward returns are `LoraLinear`s again. The second
is the custom operator that torch.compile sees (`library.operator`): `pack` and `unpack` make of any problem one list of
optional tensors and a few numbers (`packing`).

Another op has its problem in `<op>_problem`, in the same manner: CONTRIBUTING.md says how. Files of problems import no
Triton. Results are NamedTuples of tensors or None.

The order of arguments is that of `linlora.functional`, everywhere: (x, weight, bias, A0, B0, dA, dB, scaling). Inside,
the factors are named by what they do, because forward and backward are the same problem:

    shrink S0, d_shrink dS   (r, K)   wide → rank       forward: A0, dA       backward: B0ᵀ, dBᵀ
    expand E0, d_expand dE   (N, r)   rank → wide       forward: B0, dB       backward: A0ᵀ, dAᵀ
    weight                   (N, K)                     forward: W            backward: Wᵀ

The short form, of adapters that start at B0 = 0, has `shrink` and `d_expand` alone: A0 and dB forward, dBᵀ and A0ᵀ
backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .packing import Output, packable

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FROZEN, FACTORS, PARAMETERS = slice(1, 3), slice(3, 7), slice(1, 7)
"""The fields of `LoraLinear` that hold the frozen layer, the adapter, and both."""


class Factors(NamedTuple):
    """What one adapter gives to a layer: five fields of `LoraLinear` in their order."""

    A0: Tensor
    B0: Tensor | None
    dA: Tensor | None
    dB: Tensor
    scaling: float


class Result(NamedTuple):
    """What a LoRA layer gives; None for what was not asked for, or is not of the problem's form."""

    y: Any = None  # (M, N)
    y_tangent: Any = None  # (M, N), of two streams
    u: Any = None  # (M, r) = x' S0ᵀ
    c: Any = None  # (M, r), of the pair form: x' (S0 + dS)ᵀ of one stream, x' dSᵀ + x_t' S0ᵀ of two


@packable
class LoraLinear(NamedTuple):
    """One LoRA layer with its tangent::

        one stream     u = x' S0ᵀ   c = x' (S0 + dS)ᵀ         y   = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
        two streams    u = x' S0ᵀ   c = x' dSᵀ + x_t' S0ᵀ     y   = x Wᵀ + b + s u E0ᵀ
                                                              y_t = x_t Wᵀ   + s [ c E0ᵀ + u dEᵀ ]

    x' = mask/(1-p) ⊙ x is x with dropout; in the adjoint x' is x, and the mask lies over the two updates s [ … ].
    """

    x: Tensor  # (..., K), a matrix (M, K) for a backend
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    shrink: Tensor  # (r, K)
    expand: Tensor | None  # (N, r)
    d_shrink: Tensor | None  # (r, K)
    d_expand: Tensor  # (N, r)
    scaling: float
    x_tangent: Tensor | None = None  # like x; with two streams None is zero
    dropout_p: float = 0.0
    seed: Tensor | None = None  # 0-d int64, of the dropout mask; composed calls also take the mask, (M, K)
    two_streams: bool = False
    masks_update: bool = False  # the side of the mask: of the update in an adjoint, else of the shrink's input

    @property
    def op(self) -> str:
        """The public name of the op, which configurations and evidence are filed under."""
        return "lora_linear" if self.two_streams else "linearized_lora_linear"

    @property
    def rank(self) -> int:
        return self.shrink.shape[0]

    @property
    def is_pair(self) -> bool:
        return self.expand is not None

    def like_x(self, fields: slice) -> LoraLinear:
        """Itself with these fields in the dtype of x."""
        parameters: Any = self[fields]
        dtype = self.x.dtype
        for parameter in parameters:
            if parameter is not None and parameter.dtype is not dtype:
                break
        else:
            return self
        cast: Any = [parameter if parameter is None else parameter.to(dtype) for parameter in parameters]
        return LoraLinear(*(*self[: fields.start], *cast, *self[fields.stop :]))

    def adjoint(self, g: Tensor | None, g_tangent: Tensor | None = None) -> LoraLinear:
        """The problem of the transposes, whose y are the gradients of the inputs, from the cotangents (M, N).

        One stream: y is dx. Two: the streams swap, (g_t, g) gives (dx_t, dx).
        """
        if self.expand is None or self.d_shrink is None:
            shrink, expand, d_shrink, d_expand = self.d_expand.t(), None, None, self.shrink.t()
        else:
            shrink, expand = self.expand.t(), self.shrink.t()
            d_shrink, d_expand = self.d_expand.t(), self.d_shrink.t()
        x, x_tangent = (g_tangent, g) if self.two_streams else (g, None)
        assert x is not None
        return LoraLinear(
            x, self.weight.t(), None, shrink, expand, d_shrink, d_expand, self.scaling, x_tangent,
            self.dropout_p, self.seed, self.two_streams, not self.masks_update,
        )  # fmt: skip

    def primal(self) -> LoraLinear:
        """The primal of two streams alone: plain LoRA at (A0, B0), one stream in the short form."""
        (x, weight, bias, A0), B0 = self[:4], self.expand
        assert B0 is not None
        return LoraLinear(x, weight, bias, A0, None, None, B0, self.scaling, None, self.dropout_p, self.seed)

    def outputs(self, save: bool = True, primal: bool = True) -> Result:
        """What a backend returns for matrices. `save`: with u and c. Not `primal`: without the y of two streams."""
        (m, dtype), n = (self.x.shape[0], self.x.dtype), self.weight.shape[0]
        wide, low = Output((m, n), dtype), Output((m, self.rank), dtype) if save else None
        return Result(
            wide if primal or not self.two_streams else None,
            wide if self.two_streams else None,
            low,
            low if self.is_pair else None,
        )

    def check(self) -> LoraLinear:
        """Itself. Raises a ValueError that names the argument, what it is and what it has to be."""
        op, x, A0, B0, dA, dB = self.op, self.x, *self[3:7]
        n, k = check_layer(op, self)
        if A0.dim() != 2:
            refuse(op, f"A0 (r, K) is expected, got {shapes(A0=A0)}")
        shrink, expand = (A0.shape[0], k), (n, A0.shape[0])
        if B0 is None:  # and dA is without effect
            check_factors(op, x, ("A0", A0, shrink), ("dB", dB, expand))
            return self
        if dA is None:
            refuse(op, "dA is missing: with a B0 the tangent needs both dA (r, K) and dB (N, r); zeros will do")
        check_factors(op, x, ("A0", A0, shrink), ("B0", B0, expand), ("dA", dA, shrink), ("dB", dB, expand))
        return self


class Gradients(NamedTuple):
    """The gradients of a layer's factors."""

    d_expand: Any = None  # (N, Rp)
    d_shrink: Any = None  # (Rq, K)


@packable
class FactorGradients(NamedTuple):
    """The two skinny products of a backward, d_expand = s gᵀ p and d_shrink = s qᵀ x', x' = mask/(1-p) ⊙ x."""

    p: Tensor | None  # (M, Rp), with g
    g: Tensor | None  # (M, N)
    q: Tensor | None  # (M, Rq), with x
    x: Tensor | None  # (M, K)
    scaling: float
    dtype: torch.dtype  # of the gradients
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def wide(self) -> Tensor:
        """g, or x where there is no g: whose rows, dtype and device both share."""
        wide = self.x if self.g is None else self.g
        assert wide is not None
        return wide

    @property
    def rank(self) -> int:
        return max(low.shape[1] for low in (self.p, self.q) if low is not None)

    def outputs(self) -> Gradients:
        """A missing pair gives None."""
        p, g, q, x = self[:4]
        return Gradients(
            None if p is None or g is None else Output((g.shape[1], p.shape[1]), self.dtype),
            None if q is None or x is None else Output((q.shape[1], x.shape[1]), self.dtype),
        )

    def check(self) -> FactorGradients:
        """Itself. Raises a ValueError for pairs that are not whole or do not agree."""
        check_products("factor_gradients", *self[:4])
        return self


def check_products(op: str, p: Tensor | None, g: Tensor | None, q: Tensor | None, x: Tensor | None) -> None:
    """Raise a ValueError unless p comes with g, or q with x, or all four, and they share rows, dtype and device."""
    for low, wide, names in ((p, g, ("p", "g")), (q, x, ("q", "x"))):
        if (low is None) != (wide is None):
            refuse(op, f"{names[0]} and {names[1]} come together: pass both or neither")
        if low is not None and wide is not None:
            if wide.dim() != 2 or low.dim() != 2 or low.shape[0] != wide.shape[0]:
                got = shapes(**{names[0]: low, names[1]: wide})
                refuse(op, f"{names[0]} (M, R) and {names[1]} (M, columns) share their rows, got {got}")
            if (low.dtype, low.device) != (wide.dtype, wide.device):
                got = f"{low.dtype} {low.device} and {wide.dtype} {wide.device}"
                refuse(op, f"{names[0]} and {names[1]} are of one dtype on one device, got {got}")
    if g is None and x is None:
        refuse(op, "there is nothing to do: pass p and g, or q and x, or all four")
    if g is not None and x is not None and (g.shape[0], g.dtype, g.device) != (x.shape[0], x.dtype, x.device):
        got = f"{tuple(g.shape)} {g.dtype} and {tuple(x.shape)} {x.dtype}"
        refuse(op, f"g and x share rows, dtype and device, got {got}")


def check_layer(op: str, problem: Any) -> torch.Size:
    """(N, K). Raises a ValueError unless what the problems of all layers have fits: the frozen layer, its streams, its
    dropout.

    Under autocast weights and factors may be of any dtype: they are cast to that of x.
    """
    x, weight, bias = problem[:3]
    x_tangent, dtype, device = problem.x_tangent, x.dtype, x.device
    check_number(op, "scaling", problem.scaling)
    if x.dim() == 0 or weight.dim() != 2:
        refuse(op, f"x (..., K) and weight (N, K) are expected, got {shapes(x=x, weight=weight)}")
    n, k = features = weight.shape
    if x.shape[-1] != k:
        got = f"{shapes(x=x)} has {x.shape[-1]} features in its last dimension"
        refuse(op, f"{got}, {shapes(weight=weight)} takes {k}")
    if bias is not None and bias.shape != (n,):
        refuse(op, f"bias ({n},) is expected, got {shapes(bias=bias)}")
    if x_tangent is not None and (x_tangent.shape != x.shape or x_tangent.dtype != dtype):
        refuse(op, f"x_tangent is expected like x, got {shapes(x=x, x_tangent=x_tangent)}")
    if dtype not in DTYPES:
        refuse(op, f"x is {dtype}: use float32, float16, bfloat16 (or float64 on the torch backend)")
    if weight.dtype != dtype and not autocast_enabled(x):
        refuse(op, f"x is {dtype} and weight is {weight.dtype}: cast x, or run under torch.autocast")
    if weight.device != device:
        _refuse_place(op, "weight", weight, device)
    if bias is not None and bias.device != device:
        _refuse_place(op, "bias", bias, device)
    if x_tangent is not None and x_tangent.device != device:
        _refuse_place(op, "x_tangent", x_tangent, device)
    check_dropout(op, problem.dropout_p, problem.seed, x)
    return features


def check_factors(op: str, x: Tensor, *factors: tuple[str, Tensor | None, tuple[int, ...] | None]) -> None:
    """Raise a ValueError unless tensors, by name, have a shape (None: any), x's dtype or float32, and x's device."""
    dtype, device = x.dtype, x.device
    for name, factor, shape in factors:
        if factor is None:
            continue
        if shape is not None and factor.shape != shape:
            wanted = ", ".join(f"{name} {shape}" for name, factor, shape in factors if factor is not None)
            got = shapes(**{name: factor for name, factor, _ in factors})
            refuse(op, f"factors {wanted} are expected, got {got}")
        of_factor = factor.dtype
        if of_factor != dtype and of_factor is not torch.float32 and not autocast_enabled(x):
            refuse(op, f"{name} is {of_factor}: float32 or x's dtype ({dtype}) is expected")
        if factor.device != device:
            _refuse_place(op, name, factor, device)


def check_number(op: str, name: str, value: float | Tensor | None) -> None:
    """Raise a ValueError for a number that asks for a gradient."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        refuse(op, f"{name} asks for a gradient, which this op does not give; pass a number, and scale an input by it")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    """Raise a ValueError unless it is a probability below 1, and a seed that is given one of x's device."""
    if not 0.0 <= dropout_p < 1.0:
        refuse(op, f"dropout_p is {dropout_p}: a probability below 1 is expected")
    if dropout_p == 0.0 or seed is None:
        return
    if seed.dim() != 0 or seed.dtype is not torch.int64 or seed.device != x.device:
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        refuse(op, f"seed is a 0-d int64 tensor on {x.device}, got {got}")


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; False for those it does not exist on ("meta")."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def shapes(**tensors: Tensor | None) -> str:
    """The shapes of tensors by name, for a message."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)


def _refuse_place(op: str, name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    refuse(op, f"{name} is on {tensor.device}, x on {device}: move the model or the input")


def refuse(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")
