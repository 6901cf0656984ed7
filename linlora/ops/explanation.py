"""Which backend runs an op, and why not the others, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linlora.ops import backends, choice, cuda, evidence
from linlora.ops.evidence import Entry, ShapeClass, shape_class


@dataclass(frozen=True)
class Explanation:
    """Which backend an op runs on and why not the others; `str()` of it is the readable form."""

    op: str
    device: str
    backend: str
    reasons: dict[str, str]
    call: str = ""

    def __str__(self) -> str:
        call = f" ({self.call})" if self.call else ""
        lines = [f"{self.op} on {self.device}{call} runs on {self.backend!r}"]
        return "\n".join(lines + [f"  {name:6s}  {reason}" for name, reason in self.reasons.items()])


def explain(
    op: str = "linearized_lora_linear",
    device: torch.device | str = "cpu",
    *,
    shape: tuple[int, int, int] | None = None,
    rank: int = 16,
    dtype: torch.dtype | None = None,
    dropout: bool = False,
) -> Explanation:
    """Say which backend would run `op` for tensors on `device` now, and why not the others.

    Args:
        shape: (M, K, N) of the call of a LoRA layer: rows, inputs, outputs. Without one, the answer is that for the
            large shapes that training is made of.
        rank, dropout: of that call. dtype: of its x; without one, what is proven for any.

    Raises ValueError for an op that does not exist.

    >>> import linlora
    >>> print(linlora.explain("linearized_lora_linear", "cpu").backend)
    torch
    """
    if op not in backends.OPS:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(backends.OPS)}")
    device = torch.device(device)
    layer = op in backends.LAYER_OPS
    shapes: ShapeClass = "any" if not layer else "large" if shape is None else shape_class(shape[0], shape[2])
    question = _Question(op, device, shapes, dtype, rank if layer else 0, dropout and layer)
    return Explanation(op, str(device), question.answer(), question.reasons(), question.call if shape else "")


@dataclass(frozen=True)
class _Question:
    """An op on a device, and the kind of call."""

    op: str
    device: torch.device
    shape: ShapeClass
    dtype: torch.dtype | None
    rank: int
    dropout: bool

    @property
    def call(self) -> str:
        dtype = "" if self.dtype is None else " in " + str(self.dtype).removeprefix("torch.")
        shapes = "" if self.shape == "any" else f"{self.shape} shapes"
        return f"{shapes}{dtype}{' with dropout' if self.dropout else ''}".strip()

    def answer(self) -> str:
        """The backend whose code runs."""
        name = choice.name() or self._automatic()
        return "triton" if name == "cuda" and self.op not in cuda.OPS else name

    def reasons(self) -> dict[str, str]:
        return {name: self._reason(name) for name in ("cuda", "triton", "torch")}

    def _automatic(self) -> str:
        # The gradients of the factors are computed in the backward of a layer, on the backend of the layer.
        op, shape = (self.op, self.shape) if self.op != "factor_gradients" else ("linearized_lora_linear", "large")
        return backends.automatic(
            self.device.type, self.device.index, op, shape, self.dtype, self.rank, self.dropout
        )  # fmt: skip

    def _reason(self, name: str) -> str:
        if name == "cuda" and self.op not in cuda.OPS:
            return "no kernel of this op: under use_backend('cuda') it runs on 'triton'"
        refused = backends.refusal(name, self.op, self.dtype, self.rank, self.dropout)
        requested = choice.name()
        if name == self.answer():
            if requested is None:
                return "chosen automatically" + (f": {entry}" if (entry := self._entry(name)) else "")
            how = "asked for with use_backend" if requested == name else f"asked for with use_backend({requested!r})"
            return how if refused is None else f"{how}, where such a call is an error: {refused}"
        refused = backends.unavailable(name, self.device) or refused
        if refused is not None:
            return f"not available: {refused}"
        if requested is not None:
            return "available"
        if name == "torch":
            return "available; the chosen backend is faster by the runs in bench/results/"
        return f"available on request; {self._doubt(name)}"

    def _doubt(self, name: str) -> str:
        """Why a backend that could run is not chosen."""
        ran, entry = evidence.executed_on(self.op, name), self._entry(name)
        if not ran:
            return "not yet run on a GPU"
        if entry is None:
            arch = backends.architecture(self.device.type, self.device.index)
            return f"run on {', '.join(ran)}, but no run in bench/results/ is on {arch} and of {self.call or 'this op'}"
        if entry.proves and self.rank > entry.max_rank:
            return f"proven up to rank {entry.max_rank} only: {entry}"
        return f"slower than the chosen one: {entry}" if entry.proves else f"slower than torch, or wrong: {entry}"

    def _entry(self, name: str) -> Entry | None:
        arch = backends.architecture(self.device.type, self.device.index)
        found = evidence.known(self.op, arch, self.shape, self.dtype, self.dropout)
        return next((entry for entry in found if entry.backend == name), None)
