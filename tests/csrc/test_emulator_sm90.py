"""The emulated clusters, TMA, mbarriers and wgmma: what they compute, and that misuse is a named error."""

import ctypes
from pathlib import Path

import pytest
import torch

MISTAKES = (
    "none", "no wait", "no fence", "no barrier", "one arrival too many", "too few bytes", "misaligned",
    "leaves at once", "overwrites", "reads at once",
)  # fmt: skip
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.fixture(scope="module")
def run(builder):
    """Runs a kernel of primitives_sm90.cu; what it wrote, or the machine's error."""
    library = ctypes.CDLL(str(builder.build_sources([Path(__file__).parent / "primitives_sm90.cu", *builder.MACHINE])))
    library.run_sm90.restype = ctypes.c_char_p

    def run(name, inputs, other=None, *, dtype=torch.float16, place=(0, 0), mistake="none", seed=0):
        outputs = torch.full(inputs.shape, torch.nan, dtype=dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (inputs, inputs if other is None else other, outputs)]
        error = library.run_sm90(name.encode(), *pointers, *inputs.shape, *place, MISTAKES.index(mistake), seed)
        return outputs if error is None else error.decode()

    return run


@pytest.fixture
def numbers():
    return torch.randn(64, 128).half()


@seeds
@pytest.mark.parametrize("place", [(0, 0), (64, 0), (32, 24), (100, 60), (-16, -8)])
def test_a_box_that_is_loaded_and_stored_is_the_same(run, numbers, place, seed):
    column, row = place
    moved = run("moves", numbers, place=place, seed=seed)
    expected = torch.full_like(numbers, torch.nan)
    inside = slice(max(row, 0), row + 64), slice(max(column, 0), column + 64)
    expected[inside] = numbers[inside]
    torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


@seeds
def test_halves_that_two_ctas_load_for_both_reach_both(run, numbers, seed):
    assert torch.equal(run("shares", numbers, seed=seed), numbers[:, :64].repeat(1, 2))


def test_stmatrix_stores_the_fragments_of_ldmatrix(run, numbers):
    block = run("writes", numbers)[:16, :16]
    lane = torch.arange(32)
    for register, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        for element in range(2):
            held = block[row + lane // 4, column + lane % 4 * 2 + element]
            assert torch.equal(held, (8 * lane + 2 * register + element).half())


@seeds
@pytest.mark.parametrize("layout", ["K", "N"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_a_product_of_a_warpgroup(run, dtype, layout, seed):
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    name = "half" if dtype is torch.float16 else "bfloat16"
    product = run(
        f"multiplies {name} {layout}", a, b if layout == "K" else b.T.contiguous(), dtype=torch.float32, seed=seed
    )
    torch.testing.assert_close(product, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@seeds
@pytest.mark.parametrize(
    ("kernel", "mistake", "message"),
    [
        ("moves", "no wait", "races with an asynchronous write that was not waited for"),
        ("moves", "one arrival too many", "more than 1 arrivals at an mbarrier"),
        ("moves", "too few bytes", "lanes 0-0 wait for mbarrier at"),
        ("moves", "misaligned", "not at a multiple of 1024 bytes"),
        ("moves", "leaves at once", "exits without waiting for its stores"),
        ("writes", "no fence", "without a fence.proxy.async"),
        ("writes", "no barrier", "without a fence.proxy.async"),
        ("writes", "overwrites", "a write of 16 bytes of shared memory"),
        ("multiplies half K", "no wait", "races with an asynchronous"),
        ("multiplies half K", "no fence", "wgmma without a wgmma.fence"),
        ("multiplies half K", "overwrites", "races with an asynchronous read that was not waited for"),
    ],
)
def test_misuse_is_an_error_that_names_it(run, numbers, kernel, mistake, message, seed):
    multiplies = kernel.startswith("multiplies")
    inputs, dtype = (numbers[:, :64].contiguous(), torch.float32) if multiplies else (numbers, torch.float16)
    assert message in run(kernel, inputs, dtype=dtype, mistake=mistake, seed=seed)


@seeds
def test_accumulators_are_nan_until_they_are_waited_for(run, numbers, seed):
    inputs = numbers[:, :64].contiguous()
    assert run("multiplies half K", inputs, dtype=torch.float32, mistake="reads at once", seed=seed).isnan().all()
