"""Which backend runs an op, and why not the others, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linlora.ops import backends, choice, cuda, evidence
from linlora.ops.evidence import LARGE, Call, Entry, Size, power_of_two
from linlora.ops.neighbours import backend_of


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
    shape: Size | None = None,
    rank: int = 16,
    dtype: torch.dtype | None = None,
    dropout: bool = False,
) -> Explanation:
    """Say which backend would run `op` for tensors on `device` now, and why not the others.

    Args:
        shape: (M, K, N) of the call of a LoRA layer: rows, inputs, outputs; of other ops as `linlora.ops.evidence.Call`
            says. Without one, the answer is that for the large shapes that training is made of.
        rank, dropout: of that call. dtype: of its x; without one, what is proven for any.

    Raises ValueError for an op that does not exist.

    >>> import linlora
    >>> print(linlora.explain("linearized_lora_linear", "cpu").backend)
    torch
    """
    if op not in backends.OPS:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(backends.OPS)}")
    layer = op in backends.LAYER_OPS
    rows, inputs, outputs = map(power_of_two, shape or LARGE)
    call = backends.call_of(op, (rows, inputs, outputs), dtype, rank if layer else 0, dropout and layer)
    question = _Question(torch.device(device), call, dtype)
    return Explanation(op, str(device), question.answer(), question.reasons(), str(call) if shape else "")


@dataclass(frozen=True)
class _Question:
    """A call on a device."""

    device: torch.device
    call: Call
    dtype: torch.dtype | None

    def answer(self) -> str:
        """The backend whose code runs."""
        name = self._name
        return "triton" if name == "cuda" and self.call.op not in cuda.OPS else backend_of(name)

    @property
    def _name(self) -> str:
        """The backend that was asked for or chosen, with a change of its configurations if there is one."""
        return choice.name() or self._automatic()

    def reasons(self) -> dict[str, str]:
        return {name: self._reason(name) for name in ("cuda", "triton", "torch")}

    @property
    def _decided(self) -> Call:
        """The call whose evidence counts: the factors' gradients are computed in the backward of a layer."""
        return self.call if self.call.op != "factor_gradients" else self.call._replace(op="linearized_lora_linear")

    @property
    def _entry(self) -> Entry | None:
        return evidence.decisive(self._decided, self.device.index) if self.device.type in backends.DECIDED else None

    def _automatic(self) -> str:
        if self.device.type not in backends.DECIDED:
            return "torch"
        op, size, _, rank, dropout = self._decided
        return backends.automatic(self.device.index, op, size, self.dtype, power_of_two(rank), dropout)

    def _reason(self, name: str) -> str:
        op, _, _, rank, dropout = self.call
        if name == "cuda" and op not in cuda.OPS:
            return "no kernel of this op: under use_backend('cuda') it runs on 'triton'"
        refused = backends.refusal(name, op, self.dtype, rank, dropout)
        requested, entry = choice.name(), self._entry
        if name == self.answer():
            if requested is None:
                if entry is None:
                    return "chosen automatically"
                verdict = "no kernel is faster" if name == "torch" else entry.verdict(self._name)
                return f"chosen automatically: {verdict}, {entry}"
            how = "asked for with use_backend" if requested == name else f"asked for with use_backend({requested!r})"
            return how if refused is None else f"{how}, where such a call is an error: {refused}"
        refused = backends.unavailable(name, self.device) or refused
        if refused is not None:
            return f"not available: {refused}"
        if requested is not None:
            return "available"
        if name == "torch":
            return "available; the chosen backend is faster"
        if entry is not None:
            return f"available on request; {entry.verdict(entry.best(name))}, {entry}"
        ran = ", ".join(evidence.executed_on(op, name))
        ran = f"run on {ran}" if ran else "not yet run on a GPU"
        return f"available on request; {ran}, not measured here on such a call: `linlora tune`"
