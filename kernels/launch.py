"""From tensors to a launch: one description serves running on the device and compiling ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .configs import Config


class Launch(NamedTuple):
    """A kernel with its grid, arguments and configuration; built from tensors on the meta device, it can be compiled
    ahead of time."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    def run(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """Compiles for the active driver's target exactly what `run` would, and launches nothing."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self._options())

    def _options(self) -> dict[str, int]:
        # All registers that an instruction can name: left to itself, ptxas spills a few to fit one more program.
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "maxnreg": 255}


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 dots multiply; 16-bit dots have one precision.

    "tf32" once `torch.set_float32_matmul_precision` allows it. Otherwise "tf32x3": three tensor-core products of the
    operands' high and low halves, with an error near fp32's own. "ieee" would multiply outside the tensor cores and
    keep whole operand tiles in registers, which spill from rank 64 on.
    """
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def block_r(rank: int, config: Config) -> int:
    """The ranks a tile has room for: a power of two, at least the 16 that tensor cores need, at most config.block_r."""
    return min(max(16, triton.next_power_of_2(rank)), config.block_r)
