"""Tickets and flags of the Hopper kernel: any number of clusters, any schedule, any number of launches."""

import ctypes

import pytest
import torch


class Workspace:
    """Counters that are zero before the first launch, and scratch memory of any contents."""

    def __init__(self, library, problem):
        arguments = problem.arguments(problem.outputs())
        self.library = library
        for function in (library.lora_linear_sm90_counters, library.lora_linear_sm90_scratch):
            function.restype = ctypes.c_int64
        library.emulate_lora_linear_sm90_in.restype = ctypes.c_char_p
        self.counters = torch.zeros(library.lora_linear_sm90_counters(ctypes.byref(arguments)), dtype=torch.int32)
        lines = library.lora_linear_sm90_scratch(ctypes.byref(arguments)) // 128 + 2
        memory = torch.full((lines * 128,), 0xFF, dtype=torch.uint8)  # NaN
        self.scratch = memory[-memory.data_ptr() % 128 :]

    def launch(self, problem, clusters=1, resident=None, seed=0):
        outputs = problem.outputs()
        error = self.library.emulate_lora_linear_sm90_in(
            ctypes.byref(problem.arguments(outputs)), ctypes.c_void_p(self.counters.data_ptr()),
            ctypes.c_void_p(self.scratch.data_ptr()), clusters, resident or clusters, seed,
        )  # fmt: skip
        assert error is None, error.decode()
        return outputs


@pytest.fixture(scope="session")
def library(build_emulated):
    return build_emulated("lora_linear_sm90")


@pytest.fixture
def workspace(library):
    return lambda problem: Workspace(library, problem)


def assert_identical(outputs, expected):
    for name, output in outputs.items():
        assert torch.equal(output.view(torch.int16), expected[name].view(torch.int16)), name


@pytest.mark.parametrize("streams", [1, 2], ids=["one-stream", "two-streams"])
def test_outputs_are_bit_identical_under_every_schedule(workspace, make_problem, assert_right, streams):
    problem = make_problem(300, 136, 72, 40, streams=streams)
    expected = workspace(problem).launch(problem)
    assert_right(problem, expected)
    for clusters, seed in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 0), (5, 5)]:
        assert_identical(workspace(problem).launch(problem, clusters, seed=seed), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("clusters", "resident"), [(4, 1), (5, 2)])
def test_progress_does_not_depend_on_how_many_clusters_are_resident(
    workspace, make_problem, assert_right, clusters, resident, seed
):
    problem = make_problem(300, 136, 72, 8)
    assert_right(problem, workspace(problem).launch(problem, clusters, resident, seed))


def test_launches_follow_one_another_in_one_workspace(workspace, make_problem, assert_right):
    large = make_problem(300, 136, 136, 70, streams=2)
    shared = workspace(large)
    others = [
        make_problem(300, 136, 136, 70, streams=2),
        make_problem(100, 136, 72, 8, form="short"),
        make_problem(200, 72, 136, 33, transposed=True),
        make_problem(150, 136, 40, 8, streams=2, tangent=False, form="short"),
    ]
    for seed, problem in enumerate([large, *others, large]):
        assert_right(problem, shared.launch(problem, clusters=3, seed=seed))
        assert not shared.counters.any()


def test_no_more_clusters_are_launched_than_there_are_tiles(workspace, make_problem, assert_right):
    problem = make_problem(70, 40, 24, 3)
    assert_right(problem, workspace(problem).launch(problem, clusters=50))
