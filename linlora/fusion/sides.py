"""The disjoint mean of TIES: of each entry the mean of the values that have the elected sign (arXiv 2306.01708).

The positive and the negative values are summed and counted apart, which is all the elected sign chooses between. So
vectors are added one after the other, and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linlora.fusion.checks import check_number
from linlora.storage.tensors import wide


class Sides:
    """The positive and the negative values seen of one tensor: their sums and their numbers.

    >>> sides = Sides(torch.empty(3))
    >>> for values in ([3.0, -1.0, 1.0], [1.0, 4.0, -1.0]):
    ...     sides.add(torch.tensor(values))
    >>> sides.mean().tolist()
    [2.0, 4.0, 0.0]
    """

    def __init__(self, like: Tensor) -> None:
        self.up, self.down = (torch.zeros(like.shape, dtype=wide(like.dtype)) for _ in range(2))
        self.ups, self.downs = (torch.zeros(like.shape, dtype=torch.int16) for _ in range(2))

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Sides:
        """The sides of some tensors of one shape and dtype; at least one."""
        first, *others = parts
        sides = cls(first)
        for values in (first, *others):
            sides.add(values)
        return sides

    def add(self, values: Tensor) -> None:
        positive = values.relu()
        negative = values - positive  # exact: one of the two is zero
        self.up += positive
        self.down += negative
        self.ups += positive > 0
        self.downs += negative < 0

    def signs(self, rounding: float = 0.0) -> Tensor:
        """The sign of each sum; 0 where the sum is rounding, as a part of the sizes that are summed."""
        total = self.up + self.down
        return total.sign() if not rounding else total.sign() * (total.abs() > rounding * (self.up - self.down))

    def cancel(self) -> bool:
        """Whether values other than zero add up to zero somewhere, so that their sign decides nothing."""
        return bool(((self.up + self.down == 0) & (self.ups > 0)).any())

    def mean(self, undecided: float = 0.0, rounding: float = 0.0) -> Tensor:
        """The mean of the values with the elected sign.

        Args:
            undecided: the sign elected where the sum is zero; 0 for a result of zero there.
        """
        signs = self.signs(rounding)
        signs = torch.where(signs == 0, undecided, signs) if undecided else signs
        up, down = self.up / self.ups.clamp(min=1), self.down / self.downs.clamp(min=1)
        return torch.where(signs > 0, up, torch.where(signs < 0, down, 0.0))


def check_keep(method: str, keep: float) -> None:
    """Raise a ValueError unless a part of the values is above 0 and at most 1."""
    check_number(method, "keep", keep)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"{method}: keep is the part of the values kept, above 0 and at most 1, got {keep}")
