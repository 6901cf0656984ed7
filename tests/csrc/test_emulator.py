"""The emulated machine: its instructions compute what PTX's do, and what a GPU leaves undefined is a named error."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.fixture(scope="module")
def library(builder):
    library = ctypes.CDLL(str(builder.build_sources([Path(__file__).parent / "primitives.cu", *builder.MACHINE])))
    for entry in ("run_product", "run_kernel"):
        getattr(library, entry).restype = ctypes.c_char_p
    library.emulated_launch.restype = ctypes.POINTER(ctypes.c_int64 * 4)
    return library


@pytest.fixture
def run(library):
    """Runs a kernel of primitives.cu on `from` = 0, 1, 2, …; what it wrote, or the machine's error."""

    def run(name, argument=0, *, multiprocessors=1, seed=0):
        inputs, outputs = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (inputs, outputs)]
        error = library.run_kernel(name.encode(), *pointers, argument, multiprocessors, seed)
        return outputs if error is None else error.decode()

    return run


@pytest.mark.parametrize("by_rows", [False, True], ids=["ldmatrix", "ldmatrix.trans"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_product_of_matrices(library, dtype, by_rows):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), torch.nan)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, d)]
    assert library.run_product(dtype is torch.float16, *pointers, by_rows) is None
    torch.testing.assert_close(d, a.float() @ b.float())


def test_rounding_to_16_bits_is_that_of_torch(library):
    bits = torch.cat([torch.randint(-(2**31), 2**31, (200_000,)), torch.arange(0, 2**31, 12_289)]).int()
    ties = (torch.arange(2**16, dtype=torch.int64) << 16 | 0x8000).int()  # halfway between two bfloat16
    halfway = torch.arange(2**15, dtype=torch.int16).view(torch.float16).float()
    halfway = (halfway[:-1] + halfway[1:]) / 2
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), halfway, -halfway])
    values = values[~values.isnan()].contiguous()
    half, bfloat16 = (torch.empty(len(values), dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    library.round_to_16_bits(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, half, bfloat16)), ctypes.c_int64(len(values))
    )
    assert torch.equal(half, values.half())
    assert torch.equal(bfloat16, values.bfloat16())


def test_widening_16_bits_is_that_of_torch(library):
    half, bfloat16 = torch.empty(2**16), torch.empty(2**16)
    library.widen_16_bits(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (half, bfloat16)))
    bits = torch.arange(2**16).short()
    torch.testing.assert_close(half, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat16, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


@seeds
def test_threads_that_meet_see_what_others_wrote(run, seed):
    assert (run("neighbours", 1, seed=seed)[:64] == (np.arange(64) + 1) % 64).all()


@seeds
def test_a_missing_barrier_is_a_race_under_every_schedule(run, seed):
    assert "of shared memory" in run("neighbours", 0, seed=seed)


@seeds
def test_awaited_copies_are_there_and_absent_ones_zero(run, seed):
    expected = np.where(np.arange(64) % 2 == 0, 4 * np.arange(64), 0)
    assert (run("copies", 1, seed=seed)[:64] == expected).all()


@seeds
def test_a_copy_that_nobody_waited_for_is_an_error(run, seed):
    assert "an asynchronous write that was not waited for" in run("copies", 0, seed=seed)


@seeds
def test_a_copy_over_what_others_may_still_read_is_an_error(run, seed):
    error = run("copies_too_early", seed=seed)
    assert "races with" in error


def test_a_deadlock_names_who_waits_where(run):
    error = run("half_a_barrier")
    assert error.startswith("deadlock:")
    assert "warp 0, lanes 0-31 wait for barrier 0" in error
    assert "warp 1, lanes 0-7 wait for barrier 0" in error


def test_lanes_at_different_collectives_are_an_error(run):
    assert "__shfl_sync, other lanes of its warp at __shfl_xor_sync" in run("two_collectives")


def test_a_lane_that_leaves_others_at_a_collective_is_an_error(run):
    assert "a lane exits while others wait at __syncwarp" in run("one_lane_leaves")


def test_the_last_element_can_be_read(run):
    assert run("reads", 255)[0] == 255


@pytest.mark.parametrize("element", [-1, 256])
def test_a_read_outside_of_a_tensor_names_it(run, element):
    assert f"4 bytes at element {element} are outside of from (4, 64)" in run("reads", element)


def test_a_write_to_an_input_is_an_error(run):
    assert "writes to from, an input" in run("writes")


@pytest.mark.parametrize("address", [0, 1020, 1280])
def test_an_address_outside_of_shared_memory_is_an_error(run, address):
    assert f"read of 4 bytes at shared address {address}" in run("reads_shared", address)


def test_shared_memory_begins_as_nan(run):
    assert np.isnan(run("reads_shared", 1024)[0])


@seeds
def test_blocks_on_multiprocessors_of_their_own_can_wait_for_each_other(run, seed):
    assert isinstance(run("waits_for_a_later_block", multiprocessors=2, seed=seed), np.ndarray)


def test_a_block_that_waits_for_one_not_yet_started_is_a_deadlock(run):
    assert "block (0, 0, 0), warp 0, lanes 0-31 wait for a flag to reach 1" in run("waits_for_a_later_block")


def test_looking_at_a_flag_for_ever_is_an_error(run):
    assert "only look at flags" in run("only_looks")


@pytest.mark.parametrize(("words", "conflicts"), [(1, 0), (2, 1), (3, 0), (8, 7), (32, 31)])
def test_bank_conflicts_are_counted(run, library, words, conflicts):
    run("strided", words)
    assert library.emulated_launch().contents[3] == conflicts
