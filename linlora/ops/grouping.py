"""Which rows of a batch share the factors of an adapter: made once a forward, read by every layer.

Nothing here asks a device for a value: on a GPU the host never waits, and the sizes of what is made follow from the
numbers of rows, examples and groups alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops.routing_checks import check_ids
from linlora.ops.transforms import readable


@dataclass(frozen=True, eq=False)
class Groups:
    """The rows of a batch in groups: E examples of `repeats` successive rows, example e in group ids[e].

    The layers that see the batch share one of these. Where a backend wants the rows sorted, or tables of them, it
    makes its `layout` of them at the first layer and finds it again at the others.
    """

    ids: Tensor
    n_groups: int
    rows: int
    _layouts: dict[tuple[str, bool], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, task_ids: Tensor, n_groups: int, rows: int) -> Groups:
        """The groups of `rows` rows whose tasks are `task_ids`.

        Args:
            task_ids: integers below n_groups, in any shape of E elements, E dividing `rows`: (batch,) gives every
                example of a (batch, length, K) input its task, (batch, length) every token.
            n_groups: how many factors there are; groups may be empty.
            rows: the product of the leading dimensions of the layers' inputs.

        Raises ValueError for ids out of range (asserted on the device, without waiting for it, if they are on a GPU),
        and for a number of rows they do not divide.

        >>> import torch
        >>> groups = Groups.of(torch.tensor([2, 0, 2]), n_groups=3, rows=6)
        >>> groups.repeats, groups.every_row.tolist()
        (2, [2, 2, 0, 0, 2, 2])
        """
        ids = task_ids.reshape(-1)
        check_ids(ids, n_groups, rows)
        return cls(ids.long(), n_groups, rows)

    @property
    def repeats(self) -> int:
        """Successive rows of one id."""
        return self.rows // max(self.ids.shape[0], 1)

    @property
    def every_row(self) -> Tensor:
        """The group of every row, (rows,)."""
        return self.ids.unsqueeze(1).expand(-1, self.repeats).reshape(-1)

    def layout(self, backend: ModuleType) -> Any:
        """What `backend.group_rows` makes of these groups, made once."""
        static = not readable(self.ids)
        key = (backend.__name__, static)
        if key not in self._layouts:
            self._layouts[key] = backend.group_rows(self.ids, self.n_groups, self.repeats, static)
        return self._layouts[key]


def unique_tasks(task_ids: Tensor, n_tasks: int) -> tuple[Tensor, Tensor]:
    """The tasks that occur among E ids, and for every id the place of its task among them: (U,) and (E,).

    Mixing the factors of `tasks` alone, and grouping rows by the places, costs what the batch holds, whatever the
    number of tasks there are. On a GPU, where counting would wait for the device, U is min(E, n_tasks): some of these
    tasks have no rows then.

    >>> import torch
    >>> tasks, places = unique_tasks(torch.tensor([7, 2, 7]), n_tasks=100)
    >>> tasks.tolist(), places.tolist()
    ([2, 7], [1, 0, 1])
    """
    ids = task_ids.reshape(-1).long()
    if readable(ids):
        tasks, places = torch.unique(ids, return_inverse=True)
        return tasks, places
    if n_tasks <= ids.shape[0]:
        return torch.arange(n_tasks, device=ids.device), ids
    ascending, by_task = ids.sort()
    is_first = torch.ones_like(ascending)
    is_first[1:] = ascending[1:] != ascending[:-1]
    place = is_first.cumsum(0) - 1
    return torch.zeros_like(ids).scatter(0, place, ascending), torch.zeros_like(ids).scatter(0, by_task, place)
