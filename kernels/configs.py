"""The one table of kernel configurations, and the pure function that picks a row of it.

A row holds for sizes up to its `size`; the first row that fits, from the top, is taken. Every op has one size:

    op                                                  size
    linearized_lora_linear, lora_linear                 rank r
    grouped_lora_linear, dual_grouped_lora_linear       rank r
    grouped_shrink, grouped_gradients                   rank r
    mix_inventories                                     none: 0
    factor_gradients                                    the larger rank of p and q
    linear, activation                                  none: 0
    norm                                                features of a row
    attention, attention_backward                       the larger head size of q and v

No row spills registers or needs more shared memory than its architectures have: `python -m linlora.kernels.aot`
compiles every one of them and checks, at the rank of the row and at a full block of ranks. Smaller ranks and odd sides
are other code, and some of it spills, for sm_90 by Triton 3.6: 32 bytes at rank 16 in the small recompute row, 144 at
ranks 4 and 8 in the large row of flags (none in its loop over W), 1248 at odd sides in the medium row of linear.
On architecture 80 recompute serves large shapes too, but cannot win there: in the pair form it adds 2r / 64 of the
products, half at rank 16 and four times at 128, which composed calls do not. Without evidence those run.

Architecture 80 stands for every GPU from sm_80 on that is neither sm_90 nor sm_100, hence its rows keep to the 99 KiB
of shared memory that the smallest of those (sm_86, sm_89, sm_120) offer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """Everything a launch needs beyond its tensors."""

    # "recompute", "flags" (see linearized_lora_linear_flags), "split" (see factor_gradients), "tiles" (linear),
    # "rows" (norms), "elements" (activations, mixing), "online" (attention) or "gather" (routing); a block that a
    # design does not use is 0
    design: str
    block_m: int
    block_n: int  # of "elements", all that a program takes; "rows" that are longer go block by block
    block_k: int  # unused by "split", whose inner loop runs over block_m rows; of "online", columns of a head
    block_r: int  # ranks that a program holds at a time, at most; of "online", columns of its outputs
    num_warps: int
    num_stages: int
    group_m: int = 8  # rows of tiles that walk the columns together
    # persistent programs ("flags") or programs to aim at ("split", grouped_shrink); 0 follows the multiprocessors
    programs: int = 0
    splits: int = 1  # of K: programs of "recompute" that share a tile, see `split`

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}x{self.block_r}"
        splits = f" k{self.splits}" if self.splits > 1 else ""
        return f"{tile} w{self.num_warps} s{self.num_stages} g{self.group_m}{splits}"


@dataclass(frozen=True)
class Row:
    """A configuration and what it serves."""

    op: str
    shape: str  # "small", "medium" or "large", see `shape_class`; "any" where the shape does not matter
    itemsize: int  # bytes of an activation element: 2 or 4
    size: int  # the largest it serves: of a rank, of a head, of a row, as the op has it
    dropout: bool  # whether it serves dropout, or in attention a mask with a row for every query: both take registers
    architectures: tuple[int, ...]
    config: Config


_ALL, _TMA = (80, 90, 100), (90, 100)
_SM80, _SM90, _SM100 = (80,), (90,), (100,)
_WIDE = 2**31 - 1  # any width
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program may use. 80 stands for sm_86, sm_89 and sm_120 too: the smallest counts."""


def _rows(op: str, design: str, shape: str, itemsize: int, *entries: tuple) -> tuple[Row, ...]:
    return tuple(
        Row(op, shape, itemsize, size, dropout, architectures, Config(design, *numbers))
        for size, dropout, architectures, *numbers in entries
    )


# fmt: off
TABLE: tuple[Row, ...] = (
    #                                                            size dropout  for     BM   BN   BK   BR  warps stages
    *_rows("linearized_lora_linear", "recompute", "small", 2,   ( 64, True,  _TMA,     16,  64, 128,  64, 4, 3),
                                                                (256, True,  _ALL,     16,  64,  64,  64, 4, 3)),
    *_rows("linearized_lora_linear", "flags", "medium", 2,      (256, False, _SM90,    64, 128,  64,  64, 4, 4),
                                                                (256, True,  _SM90,    64,  64,  64,  64, 4, 4),
                                                                (256, True,  _SM100,  128,  64,  64,  64, 8, 4)),
    *_rows("linearized_lora_linear", "recompute", "medium", 2,  (256, True,  _SM90,    64,  64,  64,  64, 4, 3),
                                                                ( 64, True,  _SM100,   64,  64,  64,  64, 4, 3),
                                                                (256, True,  _SM100,   64,  64,  32,  64, 4, 3),
                                                                ( 64, True,  _SM80,    64,  64,  32,  64, 8, 3),
                                                                (256, True,  _SM80,    32,  64,  32,  64, 4, 3)),
    *_rows("linearized_lora_linear", "flags", "large", 2,       (256, False, _SM90,   128, 256,  64,  64, 8, 4),
                                                                (256, True,  _SM90,   128, 128,  64,  64, 8, 4),
                                                                (256, False, _SM100,  128, 128,  64,  64, 8, 4),
                                                                (256, True,  _SM100,  128,  64,  64,  64, 8, 4)),
    *_rows("linearized_lora_linear", "recompute", "large", 2,   ( 64, True,  _TMA,    128, 128,  64,  64, 8, 3),
                                                                (256, False, _SM80,   128,  64,  32,  64, 8, 3)),
    *_rows("linearized_lora_linear", "recompute", "any", 4,     (256, True,  _ALL,     16,  32,  32,  64, 4, 2)),
    *_rows("lora_linear", "recompute", "small", 2,              ( 64, True,  _TMA,     16,  64, 128,  64, 4, 3),
                                                                (256, True,  _ALL,     16,  64,  64,  64, 8, 3)),
    *_rows("lora_linear", "recompute", "large", 2,              ( 32, False, _TMA,    128, 128,  64,  64, 8, 3),
                                                                (256, True,  _TMA,    128,  64,  32,  64, 8, 3)),
    *_rows("lora_linear", "recompute", "medium", 2,             (256, True,  _TMA,     64,  64,  32,  64, 8, 3),
                                                                (256, True,  _SM80,    32,  64,  32,  64, 4, 3)),
    *_rows("lora_linear", "recompute", "any", 4,                (256, True,  _ALL,     16,  32,  16,  64, 4, 2)),
    *_rows("factor_gradients", "split", "any", 2,               ( 64, True,  _ALL,     64, 128,   0,  64, 4, 3),
                                                                (512, True,  _ALL,     64,  64,   0, 256, 8, 3)),
    *_rows("factor_gradients", "split", "any", 4,               ( 64, True,  _ALL,     32,  64,   0,  64, 4, 2),
                                                                (512, True,  _ALL,     16,  32,   0, 256, 8, 2)),
    *_rows("grouped_lora_linear", "gather", "small", 2,         (256, False, _ALL,     16,  64, 128,  64, 4, 3)),
    *_rows("grouped_lora_linear", "gather", "medium", 2,        (256, False, _ALL,     64,  64,  64,  64, 4, 3)),
    *_rows("grouped_lora_linear", "gather", "large", 2,         (256, False, _TMA,    128, 128,  64,  64, 8, 3),
                                                                (256, False, _SM80,   128,  64,  32,  64, 8, 3)),
    *_rows("grouped_lora_linear", "gather", "any", 4,           (256, False, _ALL,     16,  32,  32,  64, 4, 2)),
    *_rows("dual_grouped_lora_linear", "gather", "medium", 2,   (256, False, _TMA,     64,  64,  64,  64, 8, 3),
                                                                (256, False, _SM80,    32,  64,  32,  64, 4, 3)),
    *_rows("dual_grouped_lora_linear", "gather", "large", 2,    (256, False, _SM90,   128,  64,  64,  64, 8, 3),
                                                                (256, False, _SM100,  128, 128,  32,  64, 8, 3)),
    *_rows("dual_grouped_lora_linear", "gather", "any", 4,      (256, False, _ALL,     16,  32,  32,  64, 4, 2)),
    *_rows("grouped_shrink", "gather", "any", 2,                (256, False, _ALL,     32,   0,  64,  64, 8, 3)),
    *_rows("grouped_shrink", "gather", "any", 4,                (256, False, _ALL,     16,   0,  32,  64, 4, 2)),
    *_rows("grouped_gradients", "gather", "any", 2,             (256, False, _ALL,     64,  64,   0, 256, 8, 3)),
    *_rows("grouped_gradients", "gather", "any", 4,             (256, False, _ALL,     16,  32,   0, 256, 8, 2)),
    *_rows("mix_inventories", "elements", "any", 2,             (  0, False, _ALL,     16, 256,   0,   0, 4, 1)),
    *_rows("mix_inventories", "elements", "any", 4,             (  0, False, _ALL,     16, 256,   0,   0, 4, 1)),
    *_rows("linear", "tiles", "small", 2,                       (  0, False, _ALL,     16,  64, 128,   0, 4, 3)),
    *_rows("linear", "tiles", "medium", 2,                      (  0, False, _TMA,     64, 128,  64,   0, 4, 3),
                                                                (  0, False, _SM80,    64,  64,  32,   0, 4, 3)),
    *_rows("linear", "tiles", "large", 2,                       (  0, False, _TMA,    128, 128,  64,   0, 8, 3),
                                                                (  0, False, _SM80,   128,  64,  32,   0, 8, 3)),
    *_rows("linear", "tiles", "any", 4,                         (  0, False, _ALL,     32,  64,  32,   0, 4, 2)),
    *_rows("norm", "rows", "any", 2,                          (  256, False, _ALL,      8, 256,   0,   0, 4, 1),
                                                              ( 1024, False, _ALL,      2,1024,   0,   0, 4, 1),
                                                              ( 4096, False, _ALL,      1,4096,   0,   0, 8, 1),
                                                              ( 8192, False, _ALL,      1,8192,   0,   0, 8, 1),
                                                              (_WIDE, False, _ALL,      1,4096,   0,   0, 8, 1)),
    *_rows("norm", "rows", "any", 4,                          (  256, False, _ALL,      8, 256,   0,   0, 4, 1),
                                                              ( 1024, False, _ALL,      2,1024,   0,   0, 4, 1),
                                                              ( 4096, False, _ALL,      1,4096,   0,   0, 8, 1),
                                                              ( 8192, False, _ALL,      1,8192,   0,   0, 8, 1),
                                                              (_WIDE, False, _ALL,      1,4096,   0,   0, 8, 1)),
    *_rows("activation", "elements", "any", 2,                  (  0, False, _ALL,      0,1024,   0,   0, 4, 1)),
    *_rows("activation", "elements", "any", 4,                  (  0, False, _ALL,      0,1024,   0,   0, 4, 1)),
    *_rows("attention", "online", "any", 2,                     ( 32, False, _ALL,    128,  64,  32,  32, 8, 2),
                                                                ( 32, True,  _ALL,     64,  32,  32,  32, 8, 2),
                                                                ( 64, False, _SM90,   128,  64,  64,  64, 8, 2),
                                                                ( 64, True,  _SM90,    64,  64,  64,  64, 8, 2),
                                                                ( 64, False, _SM100,  128,  32,  64,  64, 8, 2),
                                                                ( 64, True,  _SM100,   64,  32,  64,  64, 8, 2),
                                                                ( 64, False, _SM80,   128,  32,  64,  64, 8, 2),
                                                                ( 64, True,  _SM80,    32,  32,  64,  64, 8, 2),
                                                                (128, False, _SM90,   128,  32, 128, 128, 8, 2),
                                                                (128, True,  _SM90,    64,  64,  64,  64, 8, 2),
                                                                (128, False, _SM100,   64,  64, 128, 128, 8, 2),
                                                                (128, True,  _SM100,   64,  32,  64,  64, 8, 2),
                                                                (128, False, _SM80,    32,  64, 128, 128, 8, 2),
                                                                (128, True,  _SM80,    32,  32, 128, 128, 8, 2),
                                                                (256, False, _TMA,     64,  32, 128, 128, 8, 2),
                                                                (256, True,  _TMA,     64,  32,  64,  64, 8, 2),
                                                                (256, True,  _SM80,    32,  32, 128, 128, 8, 2)),
    *_rows("attention", "online", "any", 4,                     ( 32, True,  _ALL,     16,  32,  32,  32, 4, 2),
                                                                ( 64, True,  _ALL,     16,  32,  16,  64, 4, 1),
                                                                (128, True,  _ALL,     16,  32,  32, 128, 8, 1),
                                                                (256, True,  _ALL,     16,  16,  16, 256, 8, 1)),
    *_rows("attention_backward", "online", "any", 2,            ( 32, True,  _SM80,    64,  32,  32,  32, 4, 2),
                                                                ( 32, True,  _SM90,   128,  64,  32,  32, 8, 2),
                                                                ( 32, True,  _SM100,   64,  32,  32,  32, 8, 2),
                                                                ( 64, True,  _SM80,    32,  64,  64,  64, 8, 2),
                                                                ( 64, True,  _SM90,   128,  64,  64,  64, 8, 2),
                                                                ( 64, True,  _SM100,   64,  32,  64,  64, 8, 2),
                                                                (128, False, _SM80,    64,  32, 128, 128, 8, 2),
                                                                (128, True,  _SM80,    32,  32, 128, 128, 8, 2),
                                                                (128, True,  _SM90,   128,  32, 128, 128, 8, 2),
                                                                (128, True,  _SM100,   64,  64, 128, 128, 8, 1),
                                                                (256, True,  _TMA,     64,  32, 128, 128, 8, 2),
                                                                (256, False, _SM80,    64,  32, 128, 128, 8, 2),
                                                                (256, True,  _SM80,    32,  32, 128, 128, 8, 2)),
    *_rows("attention_backward", "online", "any", 4,            ( 32, True,  _ALL,     16,  16,  32,  32, 4, 2),
                                                                ( 64, True,  _ALL,     16,  32,  16,  64, 4, 1),
                                                                (128, True,  _ALL,     16,  32,  32, 128, 8, 1),
                                                                (256, True,  _ALL,     16,  16,  16, 256, 8, 1)),
)
# fmt: on


def shape_class(m: int, n: int, itemsize: int, multiprocessors: int) -> str:
    """How much parallelism the output (M, N) offers.

    "small": at most 16 rows, bound by reading W: one row of tiles, so that W is read once. "large": at least one
    128 × 256 tile for every multiprocessor. "medium": between. fp32 has one class, "any".
    """
    if itemsize == 4:
        return "any"
    if m <= 16:
        return "small"
    return "large" if -(-m // 128) * -(-n // 256) >= multiprocessors else "medium"


@functools.cache
def select(
    op: str,
    *,
    m: int,
    n: int,
    rank: int,
    itemsize: int,
    architecture: int,
    multiprocessors: int,
    dropout: bool = False,
    descriptors: bool = False,
) -> Config:
    """The configuration of a layer's launch: a pure function of what a caller can name, so that it can be explained.

    The first row of TABLE serves that is for the op, shape class, itemsize and architecture, with a rank no smaller,
    made for dropout if there is any. The flags design serves only where `descriptors` can read the tensors
    (`linearized_lora_linear_flags.describable`). A large shape for which no large row serves takes a medium one.

    >>> select("lora_linear", m=8, n=4096, rank=16, itemsize=2, architecture=90, multiprocessors=132).block_m
    16
    """
    shape = shape_class(m, n, itemsize, multiprocessors)
    return _first(op, (shape, "medium", "any"), rank, itemsize, architecture, dropout, descriptors)


@functools.cache
def split(config: Config, *, m: int, n: int, k: int, itemsize: int, multiprocessors: int) -> Config:
    """The configuration of a "small" shape with K split among several programs a tile, where multiprocessors have none.

    Such a shape is bound by reading W, which takes more bytes in flight than half of the multiprocessors can have
    (bench/NOTES.md). A power of two up to 8, of at least four steps of K each. Others stay as they are.

    >>> row = select("lora_linear", m=8, n=4096, rank=16, itemsize=2, architecture=90, multiprocessors=132)
    >>> split(row, m=8, n=4096, k=4096, itemsize=2, multiprocessors=132).splits
    2
    """
    tiles = -(-n // config.block_n)
    if shape_class(m, n, itemsize, multiprocessors) != "small" or m * tiles == 0:
        return config
    most = min(8, multiprocessors // tiles, -(-k // config.block_k) // 4)
    return replace(config, splits=2 ** (most.bit_length() - 1)) if most > 1 else config


@functools.cache
def select_by_size(op: str, *, size: int, itemsize: int, architecture: int, dropout: bool = False) -> Config:
    """The configuration of a launch for which only the size of the op matters: attention, norms, activations."""
    return _first(op, ("any",), size, itemsize, architecture, dropout)


def _first(
    op: str,
    shapes: tuple[str, ...],
    size: int,
    itemsize: int,
    architecture: int,
    dropout: bool,
    descriptors: bool = False,
) -> Config:
    """The first row of TABLE that serves, of the first of these shapes that has one."""
    for shape in shapes:
        for row in TABLE:
            if (
                (row.op, row.shape, row.itemsize) == (op, shape, itemsize)
                and size <= row.size
                and (row.dropout or not dropout)
                and architecture in row.architectures
                and (descriptors or row.config.design != "flags")
            ):
                return row.config
    raise ValueError(f"no configuration of {op} serves size {size}, itemsize {itemsize}, architecture {architecture}")
