"""What `aot` compiles: for every op, the variants of a row that decide, and the launch that each of them stands for.

To add an op, write two functions, `<op>_cases` (row and architecture → the cases) and `<op>_launch` (case → `Launch`,
from tensors on the meta device), and enter them in `OPS`. Nothing else here or in `aot` knows an op by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .activations import launch as launch_activation
from .activations import launch_gated, launch_gated_backward
from .attention import launch as launch_attention
from .attention_backward import launch_key_gradients, launch_query_gradient
from .attention_problem import Attention, AttentionResult
from .configs import Row
from .factor_gradients import launch as launch_factor_gradients
from .grouped_gradients import launch as launch_grouped_gradients
from .grouped_lora_linear import launch as launch_grouped
from .grouped_problem import GroupedGradients, GroupedLoraLinear
from .grouped_shrink import launch as launch_grouped_shrink
from .launch import Launch
from .linear import launch as launch_linear
from .linearized_lora_linear_flags import launch as launch_flags
from .lora_linear import launch as launch_lora_linear
from .mix_inventories import Layer, mix_launch, plan_of, unmix_launch
from .norm_problem import Norm, NormResult
from .norms import launch as launch_norm
from .norms import launch_backward as launch_norm_backward
from .packing import empty
from .problem import FactorGradients, Gradients, LoraLinear, Result
from .stacks import Segments

M, N, K = 8192, 4096, 4096
BATCH, HEADS, KEY_HEADS, SEQUENCE = 2, 32, 8, 4096


@dataclass(frozen=True)
class Case:
    """One compilation: a row of the table on an architecture, at a size, in one variant of the op."""

    architecture: int
    row: Row
    size: int  # what `Row.size` says; at most that of the row
    dtype: str
    variant: str  # words that the two functions of the op agree on

    def __str__(self) -> str:
        c, size = self.row.config, f"{OPS[self.row.op].size_letter}={self.size}"
        return (
            f"sm_{self.architecture:<3} {self.row.op:22} {c.design:9} {self.row.shape:6} {size:5} "
            f"{c!s:25} {self.dtype:8} {self.variant}"
        )


class Op(NamedTuple):
    """How an op is compiled ahead of time."""

    cases: Callable[[Row, int], Iterator[Case]]  # of a row, on an architecture
    launch: Callable[[Case], Launch]
    size_letter: str = "r"  # names `Case.size`
    dot_rows: str | None = "block_m"  # the field of Config with the rows of its dots; None for an op without any


def cases(architecture: int, ops: Collection[str] = ()) -> Iterator[Case]:
    """The cases of every row of the table, or of those of some ops."""
    for row in configs.TABLE:
        if architecture in row.architectures and (not ops or row.op in ops):
            yield from OPS[row.op].cases(row, architecture)


def widest(of: Iterable[Case]) -> Iterator[Case]:
    """For each row and kernel the first case, which takes the most registers."""
    seen = set()
    for case in of:
        kernel = case.architecture, case.row, OPS[case.row.op].launch(case).kernel.fn.__name__
        if kernel not in seen:
            seen.add(kernel)
            yield case


def _dtype(row: Row) -> str:
    """bf16 stands for fp16, but where a case says otherwise."""
    return "bfloat16" if row.itemsize == 2 else "float32"


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def lora_cases(row: Row, architecture: int) -> Iterator[Case]:
    """The variant with the most registers, the backward's strides, other dtypes.

    Words: pair, short, adjoint, dropout, fp32-factors, untangled, split (K among two programs). A row is compiled at
    its rank and, where that takes more than one block of ranks, at a single full block, which is a kernel without the
    loop over blocks. These ranks stand for the smaller ones (of which some spill a little: see `configs`), the pair
    form for the short one (less of everything) except on the rows of large shapes, and bf16 for fp16 except there.
    """
    dtype, dropout = _dtype(row), " dropout" if row.dropout else ""
    one_block = min(row.size, row.config.block_r)
    ranks = {row.size} if _is_served(one_block, row, architecture) else {one_block, row.size}
    for rank in sorted(ranks):
        yield Case(architecture, row, rank, dtype, "pair fp32-factors" + dropout)
        yield Case(architecture, row, rank, dtype, "pair adjoint" + dropout)
    if row.shape == "small":
        yield Case(architecture, row, row.size, dtype, "pair fp32-factors split" + dropout)
    if row.shape == "large":
        yield Case(architecture, row, min(ranks), "float16", "short")
        if row.op == "lora_linear":
            yield Case(architecture, row, min(ranks), dtype, "pair adjoint untangled" + dropout)


def _is_served(rank: int, by: Row, architecture: int) -> bool:
    """Whether `by` is never asked for this rank: its kernel knows no single block, or a row above it comes first."""
    above = configs.TABLE[: configs.TABLE.index(by)]
    return by.config.design != "recompute" or any(
        (row.op, row.shape, row.itemsize, row.config.design) == (by.op, by.shape, by.itemsize, by.config.design)
        and architecture in row.architectures
        and rank <= row.size
        and row.dropout >= by.dropout
        for row in above
    )


def lora_launch(case: Case) -> Launch:
    config, variant, dtype, rank = case.row.config, case.variant.split(), getattr(torch, case.dtype), case.size
    config = replace(config, splits=2) if "split" in variant else config
    adjoint, pair = "adjoint" in variant, "pair" in variant
    factor_dtype = torch.float32 if "fp32-factors" in variant else dtype

    def weight_like(of: torch.dtype, rows: int, columns: int) -> Tensor:
        return _meta(of, columns, rows).t() if adjoint else _meta(of, rows, columns)

    x, shrink, expand = _meta(dtype, M, K), weight_like(factor_dtype, rank, K), weight_like(factor_dtype, N, rank)
    two_streams = case.row.op == "lora_linear"
    problem = LoraLinear(
        x, weight_like(dtype, N, K), None if adjoint else _meta(dtype, N),
        shrink, expand if pair else None, shrink if pair else None, expand, 2.0, x if two_streams else None,
        0.1 if "dropout" in variant else 0.0, _meta(torch.int64), two_streams, adjoint,
    )  # fmt: skip
    # "untangled": the backward of a layer whose input had no tangent, without y
    result = empty(problem.outputs(primal="untangled" not in variant), x)
    return (launch_flags if config.design == "flags" else launch_lora_linear)(problem, result, config)


def factor_gradients_cases(row: Row, architecture: int) -> Iterator[Case]:
    yield Case(architecture, row, row.size, _dtype(row), "pair dropout")


def factor_gradients_launch(case: Case) -> Launch:
    dtype, rank = getattr(torch, case.dtype), case.size
    p, g, x = _meta(dtype, M, rank), _meta(dtype, M, N), _meta(dtype, M, K)
    problem = FactorGradients(p, g, p, x, 2.0, torch.float32, 0.1, _meta(torch.int64))
    return launch_factor_gradients(problem, empty(problem.outputs(), x), case.row.config)


def linear_cases(row: Row, architecture: int) -> Iterator[Case]:
    """Words: bias, transposed (the weight's strides)."""
    yield Case(architecture, row, 0, _dtype(row), "bias")
    yield Case(architecture, row, 0, _dtype(row), "transposed")
    if row.shape == "large":
        yield Case(architecture, row, 0, "float16", "bias")


def linear_launch(case: Case) -> Launch:
    dtype, variant = getattr(torch, case.dtype), case.variant.split()
    x, y = _meta(dtype, M, K), _meta(dtype, M, N)
    weight = _meta(dtype, K, N).t() if "transposed" in variant else _meta(dtype, N, K)
    bias = _meta(dtype, N) if "bias" in variant else None
    return launch_linear(x, x, weight, bias, y, y, case.row.config)


def grouped_cases(row: Row, architecture: int) -> Iterator[Case]:
    """The variant with the most registers of each kernel. Words: adjoint, dropout, short (no factor of a group's own).

    The short shrink is another kernel, without the walk over groups.
    """
    yield Case(
        architecture, row, row.size, _dtype(row), "adjoint dropout" if row.op == "grouped_lora_linear" else "dropout"
    )
    if row.op == "grouped_shrink":
        yield Case(architecture, row, row.size, _dtype(row), "short")


def grouped_launch(case: Case) -> Launch:
    """All four factors in fp32, of 64 groups."""
    config, variant, dtype, rank = case.row.config, case.variant.split(), getattr(torch, case.dtype), case.size
    groups = 64
    layout = Segments(*(_meta(torch.int32, size) for size in (M, M, groups + 1)))
    x, g, low, splits = _meta(dtype, M, K), _meta(dtype, M, N), _meta(dtype, M, rank), _meta(torch.float32, 1, M, rank)
    dropout = (0.1 if "dropout" in variant else 0.0, _meta(torch.int64))
    d_shrink, d_expand = _meta(torch.float32, groups, K, rank), _meta(torch.float32, groups, rank, N)
    if case.row.op == "grouped_gradients":
        gradients = GroupedGradients(low, g, low, x, layout, groups, 2.0, torch.float32, *dropout)
        return launch_grouped_gradients(gradients, Gradients(d_expand, d_shrink), config)
    shrink, expand = _meta(torch.float32, rank, K), _meta(torch.float32, rank, N).t()
    layer = x, _meta(dtype, N, K), _meta(dtype, N), shrink, expand, d_shrink, d_expand, layout, 2.0, x, *dropout
    problem = GroupedLoraLinear(*layer, two_streams=True)
    if "short" in variant:
        problem = problem._replace(expand=None, d_shrink=None, dropout_p=0.0, x_tangent=None)
        return launch_grouped_shrink(problem, splits, None, config)
    if case.row.op == "grouped_shrink":
        return launch_grouped_shrink(problem, splits, splits, config)
    if case.row.op == "dual_grouped_lora_linear":
        return launch_grouped(problem, Result(g, g, low), (splits, splits), config)
    adjoint = problem._replace(
        weight=_meta(dtype, K, N).t(), bias=None, expand=_meta(torch.float32, N, rank),
        d_expand=d_expand.mT.contiguous().mT, x_tangent=None, two_streams=False, masks_update=True,
    )  # fmt: skip
    return launch_grouped(adjoint, Result(g, None, low, low), (splits, splits), config)


def mix_cases(row: Row, architecture: int) -> Iterator[Case]:
    """Words: mix, unmix. Weights in fp32; the one in fp32 stands for the other's, and in 16 bit the reverse."""
    yield Case(architecture, row, 0, _dtype(row), "unmix" if row.itemsize == 4 else "mix")


def mix_launch_of(case: Case) -> Launch:
    plan = plan_of((Layer(64, 4, 8, K, N, 16),), case.row.config.block_n, torch.device("meta"))
    launch = unmix_launch if case.variant == "unmix" else mix_launch
    return launch(
        _meta(torch.int64, 8), plan, (getattr(torch, case.dtype), torch.float32, torch.float32), case.row.config
    )


def norm_cases(row: Row, architecture: int) -> Iterator[Case]:
    """Words: layer, rms, tangent, backward, odd (rows that are not aligned). fp32 weights take the most registers.

    Two blocks stand for any width beyond one, the layer norm for what the RMS norm has less of.
    """
    width = min(row.size, 2 * row.config.block_n)
    for variant in ("layer tangent", "layer backward", "rms tangent"):
        yield Case(architecture, row, width, _dtype(row), variant)
    yield Case(architecture, row, width - 1, _dtype(row), "layer tangent odd")
    yield Case(architecture, row, width - 1, _dtype(row), "layer backward odd")


def norm_launch(case: Case) -> Launch:
    dtype, variant, config, width = getattr(torch, case.dtype), case.variant.split(), case.row.config, case.size
    x, weight, rstd = _meta(dtype, M, width), _meta(torch.float32, width), _meta(torch.float32, M)
    centered, x_tangent = "layer" in variant, x if "tangent" in variant else None
    problem = Norm(x, x_tangent, weight, weight if centered else None, 1e-5, centered)
    result = NormResult(x, x_tangent, rstd if centered else None, rstd)
    if "backward" in variant:
        return launch_norm_backward(problem, x, result, x, config)
    return launch_norm(problem, result, config)


def activation_cases(row: Row, architecture: int) -> Iterator[Case]:
    """Words: a kind, tangent, backward, gated, strided. Every kernel with gelu, and every kind in the largest one."""
    gated = ("gelu gated tangent", "gelu gated", "gelu gated tangent strided", "gelu gated backward")
    for variant in ("gelu tangent", "gelu", "gelu backward", *gated):
        yield Case(architecture, row, 0, _dtype(row), variant)
    for kind in ("gelu_tanh", "silu", "relu"):
        yield Case(architecture, row, 0, _dtype(row), f"{kind} gated tangent")


def activation_launch(case: Case) -> Launch:
    kind, *variant = case.variant.split()
    x = _meta(getattr(torch, case.dtype), M, 2 * N)[:, :N]
    x = x if "strided" in variant else x.contiguous()
    tangent = x if "tangent" in variant else None
    options = (kind, case.row.config)
    if "gated" in variant and "backward" in variant:
        return launch_gated_backward(x, x, x, x, x, *options)
    if "gated" in variant:
        return launch_gated(x, tangent, x, tangent, x, tangent, *options)
    if "backward" in variant:
        return launch_activation(x, x, None, x, *options)
    return launch_activation(x, tangent, x, tangent, *options)


def attention_cases(row: Row, architecture: int) -> Iterator[Case]:
    """Every row at its size and at a smaller one, a multiple of 8, in the variants with the most registers.

    Words: tangents, v-tangent, dropout, causal, mask (a row for every query), key-mask (one for all), ragged (a
    sequence of odd length, whose masks load element by element); of the backward dq and dkv, its two launches.
    """
    widest = "dropout ragged " + ("mask" if row.dropout else "key-mask")
    smaller = row.size * 5 // 8 // 8 * 8
    if row.op == "attention_backward":
        for launch in ("dq", "dkv"):
            yield Case(architecture, row, row.size, _dtype(row), f"{launch} {widest}")
            yield Case(architecture, row, smaller, _dtype(row), f"{launch} causal {widest}")
        return
    yield Case(architecture, row, row.size, _dtype(row), f"tangents {widest}")
    yield Case(architecture, row, smaller, _dtype(row), f"tangents causal {widest}")
    if not row.dropout:
        yield Case(architecture, row, row.size, _dtype(row), "tangents causal")
    if row.size == 64:
        yield Case(architecture, row, row.size, _dtype(row), "v-tangent causal")
        yield Case(architecture, row, row.size, _dtype(row), "causal")


def attention_launch(case: Case) -> Launch:
    dtype, variant, config, size = getattr(torch, case.dtype), case.variant.split(), case.row.config, case.size
    sequence = SEQUENCE - 1 if "ragged" in variant else SEQUENCE
    q, k = (_meta(dtype, BATCH, sequence, n, size).transpose(1, 2) for n in (HEADS, KEY_HEADS))
    o, lse = _meta(dtype, BATCH, HEADS, sequence, size), _meta(torch.float32, BATCH, HEADS, sequence)
    mask = None
    if "mask" in variant:
        mask = _meta(dtype, BATCH, 1, sequence, sequence)
    elif "key-mask" in variant:
        mask = _meta(torch.bool, BATCH, 1, 1, sequence)
    v_tangent = k if "tangents" in variant or "v-tangent" in variant else None
    tangents = (q, k, v_tangent) if "tangents" in variant else (None, None, v_tangent)
    options: Any = (mask, "causal" in variant, 0.1, 0.1 if "dropout" in variant else 0.0, _meta(torch.int64))
    problem = Attention(q, k, k, *tangents, *options)
    result = AttentionResult(o, o if problem.has_tangents else None, lse)
    if case.row.op == "attention":
        return launch_attention(problem, result, config)
    if "dq" in variant:
        return launch_query_gradient(problem, o, result, lse, o, config)
    return launch_key_gradients(problem, o, result, lse, (k, k), config)


OPS = {
    "linearized_lora_linear": Op(lora_cases, lora_launch),
    "lora_linear": Op(lora_cases, lora_launch),
    "factor_gradients": Op(factor_gradients_cases, factor_gradients_launch, dot_rows="block_n"),
    "grouped_lora_linear": Op(grouped_cases, grouped_launch),
    "dual_grouped_lora_linear": Op(grouped_cases, grouped_launch),
    "grouped_shrink": Op(grouped_cases, grouped_launch),
    "grouped_gradients": Op(grouped_cases, grouped_launch, dot_rows="block_n"),
    "mix_inventories": Op(mix_cases, mix_launch_of, dot_rows=None),
    "linear": Op(linear_cases, linear_launch),
    "norm": Op(norm_cases, norm_launch, size_letter="n", dot_rows=None),
    "attention": Op(attention_cases, attention_launch, size_letter="d"),
    "attention_backward": Op(attention_cases, attention_launch, size_letter="d"),
    "activation": Op(activation_cases, activation_launch, dot_rows=None),
}
