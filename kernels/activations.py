"""activation, gated_activation: elementwise nonlinearities on two streams, and their backward; one launch each.

    y = act(x)         y_t = act'(x) ⊙ x_t                                   dx  = act'(x) ⊙ g
    y = act(a) ⊙ u     y_t = act'(a) ⊙ a_t ⊙ u + act(a) ⊙ u_t                da  = act'(a) ⊙ u ⊙ g    du = act(a) ⊙ g

    a is the gate, u is up; every tensor has one shape, any shape

    act(x) = x F(x)    act'(x) = F(x) + x f(x)    f = F'

    gelu        F = (1 + erf(x/√2)) / 2, the normal distribution, and f its density
    gelu_tanh   F = (1 + tanh(h)) / 2 = σ(2h), h = √(2/π) (x + 0.044715 x³): nothing overflows
    silu        F = σ(x)
    relu        F = [x > 0]

y_t of x_t and dx of g are one formula, so `activation` and `activation_backward` are one kernel.

Tile: a program takes config.block_n elements, as wide as the rows allow. Contiguous tensors are one long row. Others
are read where they lie as matrices (rows, last dimension), so the two halves of a fused gate-and-up projection need
no copy; a tensor is copied only where its leading dimensions cannot be seen as one (`Tensor.reshape`).

Kept for backward: x, or a and u. Compute is fp32, with one rounding at the store.
Floor, in elements a position: 2, with a tangent 4, backward 3; gated 3, with both tangents 6, backward 5. All of it
is memory traffic.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_elementwise
from .configs import Config, select_by_size
from .device import device_traits
from .launch import Launch
from .tiles import load_tile, matrix, store_tile

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def distribution(b_x, KIND: tl.constexpr):
    """(F(x), f(x)) of the table above, for any finite x."""
    if KIND == "gelu":
        b_cumulative = 0.5 + 0.5 * tl.erf(b_x * _SQRT_HALF)
        b_density = tl.exp(-0.5 * b_x * b_x) * _INVERSE_SQRT_2PI
    elif KIND == "silu":
        b_cumulative = tl.sigmoid(b_x)
        b_density = b_cumulative * (1.0 - b_cumulative)
    else:
        tl.static_assert(KIND == "gelu_tanh")
        b_x = tl.clamp(b_x, -16.0, 16.0)  # F is 0 or 1 and f is 0 already, further out x² would overflow
        b_cumulative = tl.sigmoid(b_x * (1.0 + b_x * b_x * _CUBIC) * _SQRT_8_OVER_PI)
        b_slope = (1.0 + b_x * b_x * 3.0 * _CUBIC) * _SQRT_8_OVER_PI
        b_density = b_cumulative * (1.0 - b_cumulative) * b_slope
    return b_cumulative, b_density


@triton.jit
def activate(b_x, KIND: tl.constexpr):
    """act(x)."""
    if KIND == "relu":
        b_y = tl.where(b_x <= 0.0, 0.0, b_x)  # x F(x) would make a NaN of -inf
    else:
        b_cumulative, _ = distribution(b_x, KIND)
        b_y = b_x * b_cumulative
    return b_y


@triton.jit
def derivative(b_x, KIND: tl.constexpr):
    """act'(x)."""
    if KIND == "relu":
        b_slope = tl.where(b_x <= 0.0, 0.0, 1.0)
    else:
        b_cumulative, b_density = distribution(b_x, KIND)
        b_slope = b_cumulative + b_x * b_density
    return b_slope


@triton.jit
def tile_offsets(a, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of this program's tile of a. 64 bits, for one row may hold more than 2³¹ elements."""
    n_column_tiles = tl.cdiv(a.columns, BLOCK_N)
    i_m, i_n = tl.program_id(0) // n_column_tiles, tl.program_id(0) % n_column_tiles
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return o_m, i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def activation_kernel(x, z, y, dz, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = act(x) unless y is None, dz = act'(x) ⊙ z unless z is None."""
    o_m, o_n = tile_offsets(x, BLOCK_M, BLOCK_N)
    b_x = load_tile(x, o_m, o_n).to(tl.float32)
    if y is not None:
        store_tile(y, activate(b_x, KIND), o_m, o_n)
    if z is not None:
        b_z = load_tile(z, o_m, o_n).to(tl.float32)
        store_tile(dz, derivative(b_x, KIND) * b_z, o_m, o_n)


@triton.jit
def gated_activation_kernel(
    gate,
    gate_tangent,
    up,
    up_tangent,
    y,
    y_tangent,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m, o_n = tile_offsets(gate, BLOCK_M, BLOCK_N)
    b_gate = load_tile(gate, o_m, o_n).to(tl.float32)
    b_up = load_tile(up, o_m, o_n).to(tl.float32)
    b_activated = activate(b_gate, KIND)
    store_tile(y, b_activated * b_up, o_m, o_n)
    if y_tangent is not None:
        b_y_tangent = tl.zeros_like(b_up)
        if gate_tangent is not None:
            b_y_tangent += derivative(b_gate, KIND) * load_tile(gate_tangent, o_m, o_n).to(tl.float32) * b_up
        if up_tangent is not None:
            b_y_tangent += b_activated * load_tile(up_tangent, o_m, o_n).to(tl.float32)
        store_tile(y_tangent, b_y_tangent, o_m, o_n)


@triton.jit
def gated_activation_backward_kernel(
    g, gate, up, d_gate, d_up, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    o_m, o_n = tile_offsets(gate, BLOCK_M, BLOCK_N)
    b_gate = load_tile(gate, o_m, o_n).to(tl.float32)
    b_g = load_tile(g, o_m, o_n).to(tl.float32)
    store_tile(d_up, activate(b_gate, KIND) * b_g, o_m, o_n)
    b_up = load_tile(up, o_m, o_n).to(tl.float32)
    store_tile(d_gate, derivative(b_gate, KIND) * b_up * b_g, o_m, o_n)


def activation(x: Tensor, x_tangent: Tensor | None, kind: str, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), contiguous, in the shape and dtype of x; one launch, no synchronization.

    kind is "gelu", "gelu_tanh", "silu" or "relu". y_tangent is (0,) without x_tangent. `config` overrides what
    `configs.select_by_size` picks. Raises ValueError for kinds, shapes, dtypes and devices that do not fit.
    """
    check_elementwise(kind, x=x, x_tangent=x_tangent)
    y = x.new_empty(x.shape)
    y_tangent = x.new_empty(0 if x_tangent is None else x.shape)
    if x.numel() > 0:
        launch(x, x_tangent, y, None if x_tangent is None else y_tangent, kind, config or _config(x)).run(x.device)
    return y, y_tangent


def activation_backward(g: Tensor, x: Tensor, kind: str, config: Config | None = None) -> Tensor:
    """dx = act'(x) ⊙ g, contiguous, in the shape and dtype of x. Raises like `activation`."""
    check_elementwise(kind, x=x, g=g)
    dx = x.new_empty(x.shape)
    if x.numel() > 0:
        launch(x, g, None, dx, kind, config or _config(x)).run(x.device)
    return dx


def gated_activation(
    gate: Tensor,
    gate_tangent: Tensor | None,
    up: Tensor,
    up_tangent: Tensor | None,
    kind: str,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of act(gate) ⊙ up, like `activation`. Either tangent may be None; if both, y_tangent is (0,)."""
    check_elementwise(kind, gate=gate, gate_tangent=gate_tangent, up=up, up_tangent=up_tangent)
    no_tangent = gate_tangent is None and up_tangent is None
    y = gate.new_empty(gate.shape)
    y_tangent = gate.new_empty(0 if no_tangent else gate.shape)
    if gate.numel() > 0:
        outputs = (y, None if no_tangent else y_tangent)
        launch_gated(gate, gate_tangent, up, up_tangent, *outputs, kind, config or _config(gate)).run(gate.device)
    return y, y_tangent


def gated_activation_backward(
    g: Tensor, gate: Tensor, up: Tensor, kind: str, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up), contiguous, in the shape and dtype of gate; one launch. Raises like `activation`."""
    check_elementwise(kind, gate=gate, up=up, g=g)
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel() > 0:
        launch_gated_backward(g, gate, up, d_gate, d_up, kind, config or _config(gate)).run(gate.device)
    return d_gate, d_up


def _config(x: Tensor) -> Config:
    architecture = device_traits(x.device).architecture
    return select_by_size("activation", size=0, itemsize=x.element_size(), architecture=architecture)


def launch(x: Tensor, z: Tensor | None, y: Tensor | None, dz: Tensor | None, kind: str, config: Config) -> Launch:
    """The launch that fills y = act(x) and dz = act'(x) ⊙ z, either of which may be left out."""
    return _launch(activation_kernel, {"x": x, "z": z, "y": y, "dz": dz}, kind, config)


def launch_gated(
    gate: Tensor,
    gate_tangent: Tensor | None,
    up: Tensor,
    up_tangent: Tensor | None,
    y: Tensor,
    y_tangent: Tensor | None,
    kind: str,
    config: Config,
) -> Launch:
    """The launch that fills y and, where there is a tangent, y_tangent."""
    inputs = {"gate": gate, "gate_tangent": gate_tangent, "up": up, "up_tangent": up_tangent}
    return _launch(gated_activation_kernel, {**inputs, "y": y, "y_tangent": y_tangent}, kind, config)


def launch_gated_backward(
    g: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, kind: str, config: Config
) -> Launch:
    """The launch that fills d_gate and d_up."""
    tensors: dict[str, Tensor | None] = {"g": g, "gate": gate, "up": up, "d_gate": d_gate, "d_up": d_up}
    return _launch(gated_activation_backward_kernel, tensors, kind, config)


def _launch(kernel: triton.JITFunction, tensors: dict[str, Tensor | None], kind: str, config: Config) -> Launch:
    """Over tensors of one shape, none of them empty: all contiguous, one row; otherwise (rows, last dimension)."""
    present = [tensor for tensor in tensors.values() if tensor is not None]
    one_row = all(tensor.is_contiguous() for tensor in present)
    columns = present[0].numel() if one_row else present[0].shape[-1]
    rows = present[0].numel() // columns
    block_n = min(config.block_n, triton.next_power_of_2(columns))
    block_m = config.block_n // block_n
    matrices = {name: None if tensor is None else tensor.reshape(rows, columns) for name, tensor in tensors.items()}
    return Launch(
        kernel=kernel,
        grid=(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),),
        arguments={
            **{name: matrix(tensor) for name, tensor in matrices.items()},
            "KIND": kind,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        config=config,
    )
