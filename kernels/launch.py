"""From tensors to a launch: one description serves running on the device and compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .configs import Config, select, split
from .counters import counters
from .device import bind_context, device_traits
from .dropout import dropout_argument
from .neighbours import changed
from .problem import LoraLinear, Result
from .tiles import Matrix, matrix, scaling_argument


class Launch(NamedTuple):
    """A kernel with its grid, arguments and configuration; built from tensors on the meta device, it can be compiled
    ahead of time."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    def run(self, device: torch.device) -> Any:
        """The compiled kernel, launched."""
        return on_device(device, lambda: self.kernel[self.grid](**self.arguments, **self._options()))

    def compile(self) -> Any:
        """Compiles for the active driver's target exactly what `run` would, and launches nothing."""
        return self.kernel.warmup(**self.arguments, grid=self.grid, **self._options())

    def _options(self) -> dict[str, int]:
        # All registers that an instruction can name: left to itself, ptxas spills a few to fit one more program. And
        # a · b + c in one instruction, which Triton stops to do by itself from 3.10 on.
        config = self.config
        return {
            "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": 255, "enable_fp_fusion": True,
        }  # fmt: skip


def on_device(device: torch.device, launch: Callable[..., Any], arguments: Sequence[Any] = ()) -> Any:
    """launch(*arguments) with the device as the current one, by a thread that has its context."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return on_device(device, launch, arguments)
    if not triton.knobs.runtime.interpret:
        bind_context()
    return launch(*arguments)


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


def chosen(
    op: str, x: Tensor, n: int, rank: int, dropout: bool = False, descriptors: bool = False, change: str = ""
) -> Config:
    """What `configs.select` picks for rows x (M, K) and outputs (M, n), with a change of `neighbours`. `descriptors`:
    whether these can read it."""
    traits = device_traits(x.device)
    row = select(
        op,
        m=x.shape[0],
        n=n,
        rank=rank,
        itemsize=x.element_size(),
        architecture=traits.architecture,
        multiprocessors=traits.multiprocessors,
        dropout=dropout,
        descriptors=descriptors,
    )
    return changed(row, change, x.element_size(), traits.architecture)


def configuration(problem: LoraLinear, descriptors: bool = False, change: str = "") -> Config:
    """What `chosen` gives for a LoRA layer, with K split. `descriptors` says whether tensor descriptors can read it."""
    x, (n, k), dropout = problem.x, problem.weight.shape, problem.dropout_p > 0.0
    config = chosen(problem.op, x, n, problem.rank, dropout, descriptors, change)
    multiprocessors = device_traits(x.device).multiprocessors
    return split(config, m=x.shape[0], n=n, k=k, itemsize=x.element_size(), multiprocessors=multiprocessors)


def split_arguments(problem: LoraLinear, tiles: int, config: Config) -> dict[str, Any]:
    """The arguments by which programs share a tile: a counter a tile, and partial sums in fp32 of y, of y_t where there
    are two streams, of u and of c, side by side."""
    if config.splits == 1:
        return {"parts": None, "p_counters": None, "SPLITS": 1}
    m, n, streams = problem.x.shape[0], problem.weight.shape[0], 2 if problem.two_streams else 1
    parts = problem.x.new_empty(config.splits, m, streams * n + 2 * problem.rank, dtype=torch.float32)
    return {
        "parts": Matrix(parts, *parts.shape[1:], *parts.stride()[1:]),
        "p_counters": counters(problem.x.device, tiles),
        "SPLITS": config.splits,
    }


def layer_arguments(problem: LoraLinear, result: Result, config: Config) -> dict[str, Any]:
    """The arguments that the kernels of a LoRA layer share, by name."""
    rank_block = block_r(problem.rank, config)
    return {
        "x": matrix(problem.x),
        "weight": matrix(problem.weight),
        "p_bias": None if problem.bias is None else problem.bias.contiguous(),
        "shrink": matrix(problem.shrink),
        "d_shrink": matrix(problem.d_shrink),
        "expand": matrix(problem.expand),
        "d_expand": matrix(problem.d_expand),
        "y": matrix(result.y),
        "u": matrix(result.u),
        "c": matrix(result.c),
        "scaling": scaling_argument(problem.scaling),
        "dropout": dropout_argument(problem.dropout_p, problem.seed),
        "MASK_UPDATE": problem.masks_update and problem.dropout_p > 0.0,
        "PRECISION": dot_precision(problem.x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": rank_block,
        "ONE_RANK_BLOCK": problem.rank <= rank_block,
        "GROUP_M": config.group_m,
    }
