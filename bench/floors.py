"""Floors: the operations and the fewest bytes of a case, and the time a GPU's data sheet gives them."""

from __future__ import annotations

from math import prod

from .cases import Case
from .data import stream_shapes

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

# Dense peaks of the data sheets: FLOP/s in 16 bit (tensor cores) and in float32 (without), bytes/s of memory.
_PEAKS = {
    "A100": (312e12, 19.5e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "B200": (2250e12, 75e12, 8.0e12),
}


def flops(case: Case) -> int:
    """Multiplications and additions of the linearized layer or the op of model scope; 0 for a whole model.

    Of a layer, forward 2 MNK and, per rank, one shrink and one expand of x (two each in the pair form); backward the
    same for dx, and one skinny product of M rows for every trained factor.
    """
    if case.kind == "routing":
        return _routed_flops(case)
    if case.kind != "layer":
        return _stream_flops(case)
    M, K, N, r = case.M, case.K, case.N, case.rank
    terms = 2 if case.form == "pair" else 1
    streams = 2 if case.op == "lora_linear" else 1
    low = 2 * M * r * (K + N) * terms + (2 * M * r * (K + N) if streams == 2 else 0)
    once = streams * 2 * M * N * K + low
    if case.phase != "forward_backward":
        return once
    gradients = 2 * M * N * r + (2 * M * K * r if terms == 2 else 0)
    return 2 * once + gradients


def least_bytes(case: Case) -> int:
    """Every operand read once and every result written once; u and its adjoint stay on chip in forward."""
    if case.kind == "stream":
        return _stream_bytes(case)
    if case.kind == "routing":
        return _routed_bytes(case)
    M, K, N, r = case.M, case.K, case.N, case.rank
    size = _ITEMSIZE[case.dtype]
    terms = 2 if case.form == "pair" else 1
    streams = 2 if case.op == "lora_linear" else 1
    once = streams * (M * K + M * N) + N * K + terms * r * (K + N)
    if case.phase != "forward_backward":
        return size * once
    gradients = M * N + N * r + ((M * K + K * r) if terms == 2 else 0)
    return size * (2 * once + gradients)


def roofline_seconds(case: Case, gpu: str) -> float | None:
    """The least time of a layer or an op by the data sheet of a GPU; None for other GPUs and for whole models."""
    peaks = next((peak for name, peak in _PEAKS.items() if name in gpu), None)
    if peaks is None or case.kind == "model":
        return None
    half, single, bandwidth = peaks
    return max(flops(case) / (single if case.dtype == "float32" else half), least_bytes(case) / bandwidth)


def _routed_flops(case: Case) -> int:
    """The frozen layer, a shrink and an expand of every row, and the factors of every task mixed from the skills;
    backward the same for dx, two skinny products over the rows, and two products over tasks and skills."""
    M, K, N, r = case.M, case.K, case.N, case.rank
    low, mixing = 2 * M * r * (K + N), 2 * case.tasks * case.skills * r * (K + N)
    once = 2 * M * N * K + low
    return once + mixing if case.phase == "forward" else 2 * once + mixing + (low + 2 * mixing)


def _routed_bytes(case: Case) -> int:
    """Forward reads x, W, the inventory, and writes y; backward reads g, x, W and the inventory again, and writes dx
    and the gradient of the inventory. The factors of the tasks may stay in the cache."""
    M, K, N = case.M, case.K, case.N
    inventory = case.skills * case.rank * (K + N)
    forward = M * K + N * K + inventory + M * N
    backward = M * N + M * K + N * K + inventory + M * K + inventory
    return _ITEMSIZE[case.dtype] * (forward if case.phase == "forward" else forward + backward)


def _stream_flops(case: Case) -> int:
    """Attention has six products of Sq × Sk × D forward (half of each when causal): q kᵀ and P v of plain attention,
    q_t kᵀ, q k_tᵀ, P v_t and (P ⊙ S_t) v for the tangent; and five backward, those of flash attention's backward, of
    which one recomputes q kᵀ. A linear layer has one a stream, and one backward. The others have none."""
    if case.op == "attention":
        product = 2 * case.batch * case.heads * case.M * case.M * case.K // (2 if case.causal else 1)
        return (6 if case.phase == "forward" else 11) * product
    if case.op == "linear":
        return (2 if case.phase == "forward" else 3) * 2 * case.M * case.N * case.K
    return 0


def _stream_bytes(case: Case) -> int:
    """Forward reads and writes both streams and the parameters; backward reads the cotangent and what is kept, which is
    the inputs (with the output for attention; of a linear layer, the weight instead), and writes their gradients."""
    inputs, parameters, output = stream_shapes(case)
    x, frozen, y = sum(map(prod, inputs.values())), sum(map(prod, parameters.values())), prod(output)
    forward = 2 * (x + y) + frozen
    kept = {"attention": x + y, "linear": frozen}.get(case.op, x)
    return _ITEMSIZE[case.dtype] * (forward if case.phase == "forward" else forward + y + kept + x)
