"""Protocols between programs in a weak memory model: every interleaving, every stale value that C++'s model allows.

flags     `linearized_lora_linear_flags` and csrc/: writers count themselves in, readers wait for them and count too
parts     programs that share a sum store their parts and count themselves in; the last one reads all parts

A machine of views, the part of C++11 (RC11) without load buffering: a location is a list of messages in modification
order, a thread may read any message that its view has not passed, and a message carries the view that its writer
released, which read-modify-writes hand on (release sequences). An acquire joins it. Of PTX this is what release,
acquire and relaxed operations of one scope are; its proxies (TMA) and scopes are not in it.
"""

import inspect
import re
from pathlib import Path

import pytest
from linlora.kernels import linearized_lora_linear_flags as flags

ROOT = Path(__file__).parents[2]
WRITERS, READERS = 2, 2  # shrink tiles and output tiles of a row


def writer(i, release="release"):
    return [("store", f"p{i}", 1), ("add", "flag", release)]


def reader(acquire="acquire", threshold=WRITERS, last=WRITERS + READERS - 1):
    """Waits for all writers, reads what they wrote, counts itself, and sets the flag back if it is the last."""
    loads = [("load", f"p{i}") for i in range(WRITERS)]
    return [("wait", "flag", acquire, threshold), *loads, ("add", "flag", "relaxed", last)]


def sharer(i, order="acq_rel", programs=3):
    """Stores its part and counts itself; the last one reads all parts and sets the counter back to 0."""
    loads = [("load", f"p{j}") for j in range(programs)]
    return [("store", f"p{i}", 1), ("count", "flag", order, programs - 1), *loads, ("reset", "flag")]


LOCATIONS = ["flag", *(f"p{i}" for i in range(3))]
NOTHING = (0,) * len(LOCATIONS)  # a view: how far a thread has seen each location


def join(a, b):
    return tuple(map(max, a, b))


def seen_to(view, place, message):
    return tuple(max(v, message) if i == place else v for i, v in enumerate(view))


def moves(operation, messages, view):
    """What a thread may do next: its new view, and the message that it adds, or the value that it loads, or neither.
    Who counts itself and is not the last is done: its value is "done"."""
    kind, name, *rest = operation
    place, newest = LOCATIONS.index(name), len(messages) - 1
    if kind == "store":
        yield seen_to(view, place, newest + 1), (rest[0], NOTHING), None
    elif kind == "add":  # to the newest message, whose release sequence goes on; the last to count sets back at once
        order, *last = rest
        count, released = messages[newest]
        released = join(released, view) if order == "release" else released
        yield seen_to(view, place, newest + 1), (0 if last == [count] else count + 1, released), None
    elif kind == "reset":
        yield seen_to(view, place, newest + 1), (0, messages[newest][1]), None
    elif kind == "count":
        (order, last), (count, released) = rest, messages[newest]
        view = join(view, released) if "acq" in order else view
        released = join(released, view) if "rel" in order else released
        view = seen_to(view, place, newest + 1)
        yield view, (count + 1, released), None if count == last else "done"
    else:
        for at in range(view[place], newest + 1):
            value, released = messages[at]
            if kind == "load":
                yield seen_to(view, place, at), None, value
            elif value >= rest[1]:
                joined = join(view, released) if rest[0] == "acquire" else view
                yield seen_to(joined, place, at), None, None


def outcomes(threads):
    """Of every execution that ends: the values that were loaded, and the flag; "stuck" where threads wait for ever."""
    start = (tuple(((0, NOTHING),) for _ in LOCATIONS), tuple((0, NOTHING) for _ in threads), ())
    found, seen, todo = set(), {start}, [start]
    while todo:
        memory, states, loaded = todo.pop()
        following = set()
        for i, (step, view) in enumerate(states):
            for operation in threads[i][step : step + 1]:
                place = LOCATIONS.index(operation[1])
                for moved, message, value in moves(operation, memory[place], view):
                    written = (*memory[place], message) if message else memory[place]
                    values = loaded if value in (None, "done") else tuple(sorted((*loaded, value)))
                    after = len(threads[i]) if value == "done" else step + 1
                    state = (*states[:i], (after, moved), *states[i + 1 :])
                    following.add(((*memory[:place], written, *memory[place + 1 :]), state, values))
        if not following:
            ended = all(step == len(thread) for (step, _), thread in zip(states, threads, strict=True))
            found.add((loaded, memory[0][-1][0]) if ended else "stuck")
        todo += following - seen
        seen |= following
    return found


RIGHT = {((1,) * WRITERS * READERS, 0)}


def test_every_reader_sees_every_write_and_the_flag_ends_at_zero():
    assert outcomes([*map(writer, range(WRITERS)), *(reader() for _ in range(READERS))]) == RIGHT


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"writer": {"release": "relaxed"}}, "stale"),
        ({"reader": {"acquire": "relaxed"}}, "stale"),
        ({"reader": {"threshold": WRITERS - 1}}, "stale"),
        ({"reader": {"last": WRITERS + READERS - 2}}, "flag"),
    ],
    ids=["no-release", "no-acquire", "one-writer-less", "reset-too-early"],
)
def test_a_weaker_protocol_is_found(change, wrong):
    writers = [writer(i, **change.get("writer", {})) for i in range(WRITERS)]
    found = outcomes([*writers, *(reader(**change.get("reader", {})) for _ in range(READERS))])
    if wrong == "stale":
        assert any(0 in outcome[0] for outcome in found if outcome != "stuck")
    else:
        assert any(outcome == "stuck" or outcome[1] != 0 for outcome in found)


def test_the_last_of_the_programs_that_share_a_sum_sees_every_part_and_the_counter_ends_at_zero():
    assert outcomes([sharer(i) for i in range(3)]) == {((1, 1, 1), 0)}


@pytest.mark.parametrize("order", ["acquire", "release", "relaxed"])
def test_a_weaker_order_of_the_counter_loses_parts(order):
    assert any(0 in outcome[0] for outcome in outcomes([sharer(i, order) for i in range(3)]))


@pytest.mark.parametrize("module", ["lora_linear", "factor_gradients", "mix_inventories"])
def test_every_counter_of_parts_has_the_order_of_the_model(module):
    """All threads of a program meet before one of them counts; parts are read past the first-level cache."""
    source = (ROOT / f"kernels/{module}.py").read_text()
    counted = re.findall(r'(\w[^\n]*)\n *if tl\.atomic_add\(p_counters?[^,]*, 1, sem="(\w+)"\) == \w+ - 1:', source)
    assert len(counted) == 1
    assert counted[0][0].startswith("tl.debug_barrier()")
    assert counted[0][1] == "acq_rel"


def test_the_sources_have_the_orders_of_the_model():
    triton = inspect.getsource(flags)
    assert re.findall(r'tl\.atomic_add\(p_flag, (\d), sem="(\w+)"', triton) == [
        ("1", "release"), ("0", "acquire"), ("1", "relaxed"),
    ]  # fmt: skip
    assert "red.release.gpu.global.add.u32" in (ROOT / "csrc/ptx_sm90.cuh").read_text()
    assert "ld.acquire.gpu" in (ROOT / "csrc/ptx.cuh").read_text()
