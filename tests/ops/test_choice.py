"""The choice of a backend belongs to the thread or task that made it, and autograd's threads are handed it."""

import asyncio
import threading

import pytest
import torch

import linlora
from linlora import functional
from linlora.ops import choice, composed


def test_overlapping_blocks_of_threads_are_told_apart():
    inside, both = {}, threading.Barrier(3)

    def thread(name):
        with linlora.use_backend(name):
            both.wait()  # all are in their blocks
            inside[name] = choice.name()
            both.wait()

    threads = [threading.Thread(target=thread, args=(name,)) for name in ("torch", "triton")]
    for each in threads:
        each.start()
    both.wait()
    inside["none"] = choice.name()
    both.wait()
    for each in threads:
        each.join()
    assert inside == {"torch": "torch", "triton": "triton", "none": None}
    assert choice.name() is None


def test_overlapping_blocks_of_asyncio_tasks_are_told_apart():
    async def task(name, entered, leave):
        with linlora.use_backend(name):
            entered.set()
            await leave.wait()
            return choice.name()

    async def overlap():
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(task("torch", *events[:2]))
        await events[0].wait()
        second = asyncio.create_task(task("triton", *events[2:]))
        await events[2].wait()
        outside = choice.name()
        events[1].set()  # the first leaves before the second
        results = [await first, choice.name()]
        events[3].set()
        return [*results, await second, outside, choice.name()]

    assert asyncio.run(overlap()) == ["torch", None, "triton", None, None]
    assert choice.name() is None
    chosen = torch.compile(lambda x: x + (choice.name() is not None), backend="eager", fullgraph=True)
    assert chosen(torch.zeros(1)) == 0  # nor has compiled code a choice, or a backward's thread
    assert choice._handed() is None


def test_a_thread_of_autograd_has_what_torch_hands_it():
    """torch copies its thread state to the threads of a backward; here a thread is given it by hand."""
    seen = []
    with linlora.use_backend("torch"):
        handed = torch._C._get_obj_in_tls(choice._HANDED_ON)

        def worker():
            seen.append(choice.name())
            torch._C._stash_obj_in_tls(choice._HANDED_ON, handed)
            seen.append(choice.name())
            with linlora.use_backend("triton"):
                seen.append(choice.name())
            seen.append(choice.name())

        thread = threading.Thread(target=worker)
        thread.start()
        thread.join()
    assert seen == [None, "torch", "triton", "torch"]


@pytest.mark.parametrize("backends", [("torch", "triton", "torch"), ("triton", "torch", "triton")])
def test_compiled_code_follows_the_choice(monkeypatch, backends):
    monkeypatch.setattr(composed, "SMALL", 0)
    graphs = []

    def spy(graph, inputs):
        graphs.append("triton" if "linlora" in str([str(node.target) for node in graph.graph.nodes]) else "torch")
        return graph.forward

    x, W, A0, dB = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    compiled = torch.compile(
        lambda x: functional.linearized_lora_linear(x, W, None, A0, None, None, dB, 1.0), backend=spy, fullgraph=True
    )
    with torch.no_grad():
        for name in backends:
            with linlora.use_backend(name):
                compiled(x)
    assert graphs == list(backends[:2])  # the third finds the first again
