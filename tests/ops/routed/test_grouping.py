"""Rows in groups, made without looking at them where that would cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linlora import kernels
from linlora.functional import Groups, unique_tasks
from linlora.ops import aten, transforms


@given(ids=st.lists(st.integers(0, 6), max_size=60), repeats=st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_groups_hold_every_row_once_in_a_block_of_its_task(ids, repeats):
    ids = torch.tensor(ids, dtype=torch.int64)
    rows = torch.arange(len(ids) * repeats)
    for static in (False, True):
        layout = aten.group_rows(ids, 7, repeats, static)
        placed = layout.gather(rows.unsqueeze(1))
        assert torch.equal(layout.scatter(placed).squeeze(1), rows)
        real = torch.ones(len(placed), dtype=torch.bool)
        if layout.padding is not None:
            real[layout.padding] = False
            assert not placed[layout.padding].any()
        assert real.sum() == len(rows)
        for block, is_real, group in zip(layout.cut(placed), real.view(-1, layout.length), layout.groups, strict=True):
            assert (ids.repeat_interleave(repeats)[block[is_real]] == group).all()


@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=60), repeats=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_segments_sort_the_rows_by_group(ids, repeats):
    ids = torch.tensor(ids, dtype=torch.int64)
    segments = kernels.group_rows(ids, 7, repeats, True)
    rows = ids.repeat_interleave(repeats)
    assert torch.equal(segments.order.sort().values, torch.arange(len(rows), dtype=torch.int32))
    assert torch.equal(rows[segments.order].int(), segments.groups)
    for group in range(7):
        assert (segments.groups[segments.first[group] : segments.first[group + 1]] == group).all()
    assert segments.first[-1] == len(rows)


@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=30), n_tasks=st.integers(10, 40))
@settings(max_examples=40, deadline=None)
def test_unique_tasks_with_and_without_counting(ids, n_tasks):
    ids = torch.tensor(ids)
    with pytest.MonkeyPatch.context() as patch:
        for counts in (True, False):
            patch.setattr("linlora.ops.grouping.readable", lambda _, counts=counts: counts)
            tasks, places = unique_tasks(ids, n_tasks)
            assert torch.equal(tasks[places], ids)
            assert len(tasks) == (len(ids.unique()) if counts else min(len(ids), n_tasks))


def test_a_layout_is_made_once_for_all_layers(monkeypatch, device):
    made = []
    original = aten.group_rows
    monkeypatch.setattr(aten, "group_rows", lambda *a: (made.append(a), original(*a))[1])
    groups = Groups.of(torch.tensor([0, 1, 0], device=device), 2, 6)
    assert groups.layout(aten) is groups.layout(aten)
    assert len(made) == 1


def test_nothing_is_asked_of_a_device(monkeypatch):
    """Meta tensors have no values: whatever needed one would raise."""
    ids = torch.zeros(20, dtype=torch.int64, device="meta")
    for backend in (aten, kernels):
        layout = Groups.of(ids, 4, 60).layout(backend)
        assert layout.groups.device.type == "meta"
    assert [len(t) for t in unique_tasks(ids, 100)] == [20, 20]
    assert not transforms.transform_active()


@pytest.mark.parametrize(
    ("ids", "n_groups", "rows", "message"),
    [
        ([0, 3], 3, 4, "task id 3 is unknown: the ids of 3 tasks are 0 to 2"),
        ([0, -1], 3, 4, "task id -1 is unknown"),
        ([0, 1, 2], 3, 4, "4 rows are not a whole number for each of 3 task ids"),
        ([], 3, 4, "4 rows are not a whole number for each of 0 task ids"),
        ([0.0], 3, 4, "task_ids are integers, got torch.float32"),
    ],
)
def test_groups_that_do_not_fit_are_named(ids, n_groups, rows, message):
    ids = torch.tensor(ids) if ids else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Groups.of(ids, n_groups, rows)


def test_no_rows_make_no_groups():
    groups = Groups.of(torch.zeros(0, dtype=torch.int64), 3, 0)
    assert groups.repeats == 0
    assert groups.every_row.shape == (0,)
