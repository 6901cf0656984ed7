"""Low-rank updates folded into a weight, and taken out of it again bit for bit.

    fold      W' = round(W + ΔW)       ΔW = A-and-B product, summed with W in float32 (or wider), rounded once
    unfold    W  = round(W' - ΔW)      and, where rounding lost it, the value kept for that element

In blocks of rows: a block of float32 is all there is beside W. W' - ΔW rounds back to W except where the sum lies on a
coarser grid of numbers than W, so what `fold_keeping` keeps is small: the factors, and about one element in a hundred
for a ΔW of a hundredth of W, one in thirteen for a tenth. A block is kept whole where that is less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linlora.storage.tensors import finite, wide

BLOCK = 2**20
"""Elements of a block: 4 MiB of float32. Larger ones fall out of the cache, smaller ones are launches."""
_LARGE = 1e30
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Update:
    """ΔW = B A with A (R, K) and B (N, R), the scaling in B, float32 or wider; adapters lie side by side.

    `transposed` says that the weight is stored (K, N), as transformers' Conv1D does.
    """

    A: Tensor
    B: Tensor
    transposed: bool = False

    @property
    def left(self) -> Tensor:
        """The factor whose rows are the rows of the stored weight."""
        return self.A.t() if self.transposed else self.B

    @property
    def right(self) -> Tensor:
        return self.B.t() if self.transposed else self.A

    def norm(self) -> float:
        """‖ΔW‖, Frobenius, from the factors alone: ‖R_B R_Aᵀ‖ of their QR factors, in float64.

        >>> Update(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])).norm()
        10.0
        """
        R_B, R_A = (torch.linalg.qr(factor.double(), mode="r").R for factor in (self.B, self.A.t()))
        return float((R_B @ R_A.t()).norm())


Pending = tuple[str, Tensor, Update]
"""The name of a layer, its weight, and the update that is to be folded into it."""


def stacked(
    A0: Tensor, B0: Tensor | None, dA: Tensor | None, dB: Tensor, scaling: float = 1.0, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors (A', B') of one LoRA product, s [(B0 + dB) A0 + B0 dA] = B' A', in float32 or wider.

    A' = [A0; dA] and B' = s [B0 + dB, B0], of rank 2r; of rank r, A0 and s dB, where B0 is None. This is the ΔW of a
    layer linearized by itself, and of plain LoRA, whose A is A0 and whose B is dB.

    Args:
        like: a tensor whose dtype, where it is wider, the factors get.

    >>> A, B = stacked(torch.ones(1, 2), torch.ones(3, 1), torch.ones(1, 2), torch.ones(3, 1), 0.5)
    >>> A.shape, B.tolist()
    (torch.Size([2, 2]), [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    """
    dtype = wide(A0.dtype, dB.dtype, *(() if like is None else (like.dtype,)))
    A0, dB = A0.to(dtype), dB.to(dtype)
    if B0 is None or dA is None:
        return A0, scaling * dB
    B0, dA = B0.to(dtype), dA.to(dtype)
    return torch.cat([A0, dA]), scaling * torch.cat([B0 + dB, B0], dim=1)


@dataclass(frozen=True)
class Fold:
    """One fold, as `unfold` undoes it: the update, and the elements of each block that subtracting it does not restore.

    They are (positions in the flat block, values), or (None, the block). The digests are of the bits of the weight.
    """

    update: Update
    lost: list[tuple[Tensor | None, Tensor]]
    unfolded: int
    folded: int

    @property
    def nbytes(self) -> int:
        """Bytes kept until the weight is unfolded."""
        kept = [self.update.A, self.update.B, *(tensor for block in self.lost for tensor in block)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)


def fold(weight: Tensor, update: Update) -> None:
    """W ← round(W + ΔW), in place.

    Args:
        weight: (N, K), or (K, N) for an update that is transposed; contiguous or not.

    >>> weight = torch.eye(2)
    >>> fold(weight, Update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.5]])))
    >>> weight.tolist()
    [[2.0, 2.0], [0.5, 2.0]]
    """
    for rows in blocks(weight.shape):
        weight[rows] = folded(weight[rows], update, rows)


def rehearse(weight: Tensor, update: Update) -> None:
    """`fold` of the first block, which is written back as it was: what would stop `fold` midway raises here."""
    for rows in blocks(weight.shape):
        before = weight[rows].clone()
        weight[rows] = folded(before, update, rows)
        weight[rows] = before
        break


def check_sum(weight: Tensor, update: Update) -> None:
    """Raise OverflowError where W + ΔW is not finite in the dtype of W, before anything of it is written.

    Sums are formed in float16, whose range ends at 65504; in wider dtypes where the factors are not finite, or close.
    """
    if weight.dtype == torch.float16 or not float(update.A.norm() * update.B.norm()) < _LARGE:
        for rows in blocks(weight.shape):
            folded(weight[rows], update, rows)


def check_fold(name: str, weight: Tensor, update: Update) -> None:
    """Raise a ValueError, with the name of the layer, where `fold` would fail; the weight is as it was."""
    try:
        check_sum(weight, update)
        rehearse(weight, update)
    except OverflowError as error:
        raise ValueError(f"layer '{name}': {error}; the model is unchanged") from error


def fold_all(folds: Iterable[Pending]) -> None:
    """Fold the updates of all layers: the last step of a merge, because nothing undoes it."""
    for name, weight, update in folds:
        try:
            fold(weight, update)
        except Exception as error:
            raise RuntimeError(
                f"merge: stopped at layer '{name}', when others had been folded; the weights are neither those of "
                "the base nor merged, load the base model again"
            ) from error


def folded(block: Tensor, update: Update, rows: slice) -> Tensor:
    """Returns round(W + ΔW) for some rows of a weight, which need not be in memory as a whole; `block` is left alone.

    Raises OverflowError where the sum is not finite in the dtype of W.

    >>> folded(torch.ones(1, 2), Update(torch.ones(1, 2), torch.tensor([[0.0], [3.0]])), slice(1, 2)).tolist()
    [[4.0, 4.0]]
    """
    total = _sum(block, update, rows, 1.0)
    if not finite(total):
        raise OverflowError(f"W + ΔW is not finite in {total.dtype}; a smaller scaling or a wider dtype is needed")
    return total


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a weight in blocks of at most BLOCK elements."""
    height = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))


def fold_keeping(weight: Tensor, update: Update) -> Fold:
    """`fold`, and what undoes it exactly.

    >>> weight = torch.randn(3, 2).bfloat16()
    >>> before = weight.clone()
    >>> kept = fold_keeping(weight, Update(torch.randn(1, 2), torch.randn(3, 1)))
    >>> unfold(weight, kept)
    >>> torch.equal(weight, before)
    True
    """
    update = Update(update.A.clone(), update.B.clone(), update.transposed)  # the caller's may be trained further
    lost: list[tuple[Tensor | None, Tensor]] = []
    unfolded = _digest(weight)
    for rows in blocks(weight.shape):
        before = weight[rows].clone(memory_format=torch.contiguous_format)
        weight[rows] = after = _sum(before, update, rows, 1.0)
        positions = (_bits(_sum(after, update, rows, -1.0)) != _bits(before)).flatten().nonzero().flatten()
        cheap = positions.numel() * (4 + before.element_size()) < before.numel() * before.element_size()
        lost.append((positions.int(), before.flatten()[positions]) if cheap else (None, before))
    return Fold(update, lost, unfolded, _digest(weight))


def unfold(weight: Tensor, kept: Fold) -> None:
    """Undo `fold_keeping`, in place and bit for bit.

    Raises ValueError, and leaves the weight alone, where it is not the one that was folded; RuntimeError if the bits
    did not come back, because the arithmetic is not that of the fold any more.
    """
    dtype, device = kept.lost[0][1].dtype, kept.update.A.device
    if weight.dtype != dtype:
        raise ValueError(
            f"the weight was merged as {dtype} and is {weight.dtype} now; unmerge before the model is cast"
        )
    if _digest(weight) != kept.folded:
        raise ValueError(
            "the weight was changed while adapters were merged into it; unmerge before the base is trained or loaded"
        )
    for rows, (positions, values) in zip(blocks(weight.shape), kept.lost, strict=True):
        before = values
        if positions is not None:  # on the device of the fold, because devices round differently
            before = _sum(weight[rows].to(device), kept.update, rows, -1.0)
            before.view(-1)[positions.long()] = values
        weight[rows] = before.to(weight.device)
    if _digest(weight) != kept.unfolded:
        raise RuntimeError("sums are rounded otherwise than when the adapters were merged; load the base model again")


def _sum(block: Tensor, update: Update, rows: slice, sign: float) -> Tensor:
    """round(block ± ΔW[rows]); the same bits for the same arguments."""
    total = block.to(update.A.dtype, copy=True, memory_format=torch.contiguous_format)
    return total.addmm_(update.left[rows], update.right, alpha=sign).to(block.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _digest(weight: Tensor) -> int:
    """A sum of the bits, each times an odd number of its place, so that values that changed places are seen too."""
    total = 0
    for rows in blocks(weight.shape):
        bits = _bits(weight[rows].contiguous()).to(torch.int64)
        places = torch.arange(bits.numel(), device=bits.device).view_as(bits) * 2 + 1
        total = (total * 31 + int((bits * places).sum())) % 2**64
    return total
