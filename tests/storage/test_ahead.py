"""Values computed ahead are those of one thread, in any order of asking, and errors come where they belong."""

import concurrent.futures
import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from linlora.storage.ahead import Ahead

NAMES = [str(number) for number in range(20)]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def product(name):
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(int(name)))
    return torch.linalg.svd(matrix @ matrix).S


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], NAMES[5:] + NAMES[:7], ["3", "4", "5", "3", "4", "9"]])
def test_values_are_those_of_one_thread_in_any_order(order):
    ahead = Ahead(NAMES, product)
    for name in order:
        assert torch.equal(ahead(name), product(name))
        assert ahead(name) is ahead(name)
    assert torch.get_num_threads() == 3


def test_the_next_ones_are_computed_meanwhile_and_few_of_them():
    by, most = {}, 0

    def make(name):
        by[name] = threading.current_thread().name, torch.get_num_threads()
        return name

    ahead = Ahead(NAMES, make)
    for number, name in enumerate(NAMES):
        assert ahead(name) == name
        most = max(most, len(by) - number)
    main = threading.current_thread().name
    assert by.pop("0") == (main, 1)
    assert all(thread != main and count == 1 for thread, count in by.values())
    assert most <= 4


def test_an_error_is_raised_where_its_name_is_asked_for():
    def make(name):
        if name == "7":
            raise ValueError(name)
        return name

    ahead = Ahead(NAMES, make)
    assert [ahead(name) for name in NAMES[:7]] == NAMES[:7]
    with pytest.raises(ValueError, match="7"):
        ahead("7")
    assert [ahead(name) for name in NAMES[8:]] == NAMES[8:]
    assert torch.get_num_threads() == 3


def test_one_that_asks_another_waits_for_none_of_its_threads():
    inner = Ahead(NAMES, product)
    outer = Ahead(NAMES, lambda name: inner(name) + inner(NAMES[-1]))
    for name in NAMES:
        assert torch.equal(outer(name), product(name) + product(NAMES[-1]))
        assert torch.equal(inner(name), product(name))


@pytest.mark.parametrize("asked", [2, 8, len(NAMES)])
def test_threads_that_start_later_take_the_number_from_before(asked, monkeypatch):
    """Also where the rest is not asked for, an error ends the asking, or its own threads start late."""
    set_number, late = torch.set_num_threads, itertools.count()

    def set_late(number):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02 * next(late))
        set_number(number)

    monkeypatch.setattr(torch, "set_num_threads", set_late)

    def make(name):
        if name == "7":
            raise ValueError(name)
        return product(name)

    ahead = Ahead(NAMES, make)
    for name in NAMES[:asked]:
        with contextlib.suppress(ValueError):
            ahead(name)
    concurrent.futures.wait(list(ahead._coming.values()))
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 3
