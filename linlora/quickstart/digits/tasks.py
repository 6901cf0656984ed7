"""The tasks: a question about the digit, asked in a domain the backbone has not been trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from linlora.experiments.image_suite import Split, SplitName
from linlora.quickstart.digits.data import Images


@dataclass(frozen=True)
class Task:
    """`domain` maps images (n, 1, 8, 8) to images, `question` maps digits (n,) to labels in 0 ... labels - 1."""

    name: str
    domain: Callable[[Tensor], Tensor]
    question: Callable[[Tensor], Tensor]
    labels: int

    def splits(self, digits: Images) -> dict[SplitName, Split]:
        return digits.split(self.domain(digits.images), self.question(digits.digits))


def rotated(images: Tensor) -> Tensor:
    return torch.rot90(images, dims=(-2, -1))


def inverted(images: Tensor) -> Tensor:
    """Dark on light, with noise: drawn once from a fixed seed, so the data set is the same in every run."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (-images + 0.25 * noise).clamp(-1, 1)


def mirrored(images: Tensor) -> Tensor:
    return images.flip(-1)


def upside_down(images: Tensor) -> Tensor:
    return images.flip(-2)


def transposed(images: Tensor) -> Tensor:
    return images.transpose(-2, -1).contiguous()


def shifted(images: Tensor) -> Tensor:
    """Three pixels to the right, wrapped around, and blurred."""
    return avg_pool2d(images.roll(3, dims=-1), kernel_size=3, stride=1, padding=1, count_include_pad=False)


def which_digit(digits: Tensor) -> Tensor:
    return digits


def is_odd(digits: Tensor) -> Tensor:
    return digits % 2


def is_five_or_more(digits: Tensor) -> Tensor:
    return (digits >= 5).long()


def is_one_of(*members: int) -> Callable[[Tensor], Tensor]:
    return lambda digits: torch.isin(digits, torch.tensor(members)).long()


TASKS = (
    Task("rotated-digit", rotated, which_digit, 10),
    Task("inverted-digit", inverted, which_digit, 10),
    Task("mirrored-odd", mirrored, is_odd, 2),
    Task("transposed-five-or-more", transposed, is_five_or_more, 2),
    Task("shifted-loop", shifted, is_one_of(0, 6, 8, 9), 2),
    Task("upside-down-prime", upside_down, is_one_of(2, 3, 5, 7), 2),
)


def select_tasks(names: tuple[str, ...] | None) -> tuple[Task, ...]:
    """The tasks of the given names, all of them for None."""
    if names is None:
        return TASKS
    known = {task.name: task for task in TASKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no task {unknown}; choose from {list(known)}")
    return tuple(known[name] for name in names)
