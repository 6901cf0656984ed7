"""Floors: the operations and the fewest bytes of a case, and the time a GPU's data sheet gives them."""

from __future__ import annotations

from .cases import Case

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

# Dense peaks of the data sheets: FLOP/s in 16 bit (tensor cores) and in float32 (without), bytes/s of memory.
_PEAKS = {
    "A100": (312e12, 19.5e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "B200": (2250e12, 75e12, 8.0e12),
}


def flops(case: Case) -> int:
    """Multiplications and additions of the linearized layer.

    Forward 2 MNK and, per rank, one shrink and one expand of x (two each in the pair form); backward the same for dx,
    and one skinny product of M rows for every trained factor.
    """
    M, K, N, r = case.M, case.K, case.N, case.rank
    terms = 2 if case.form == "pair" else 1
    streams = 2 if case.op == "lora_linear" else 1
    low = 2 * M * r * (K + N) * terms + (2 * M * r * (K + N) if streams == 2 else 0)
    once = streams * 2 * M * N * K + low
    if case.phase == "forward":
        return once
    gradients = 2 * M * N * r + (2 * M * K * r if terms == 2 else 0)
    return 2 * once + gradients


def least_bytes(case: Case) -> int:
    """Every operand read once and every result written once; u and its adjoint stay on chip in forward."""
    M, K, N, r = case.M, case.K, case.N, case.rank
    size = _ITEMSIZE[case.dtype]
    terms = 2 if case.form == "pair" else 1
    streams = 2 if case.op == "lora_linear" else 1
    once = streams * (M * K + M * N) + N * K + terms * r * (K + N)
    if case.phase == "forward":
        return size * once
    gradients = M * N + N * r + ((M * K + K * r) if terms == 2 else 0)
    return size * (2 * once + gradients)


def roofline_seconds(case: Case, gpu: str) -> float | None:
    """The least time of a layer case by the data sheet of a GPU; None for other GPUs and for whole models."""
    peaks = next((peak for name, peak in _PEAKS.items() if name in gpu), None)
    if peaks is None or case.op == "model":
        return None
    half, single, bandwidth = peaks
    return max(flops(case) / (single if case.dtype == "float32" else half), least_bytes(case) / bandwidth)
