"""The Hopper kernel on the emulated machine: every output against float64, in every form and layout."""

import ctypes

import pytest
import torch

forms = pytest.mark.parametrize("form", ["short", "pair"])
streams = pytest.mark.parametrize("streams", [1, 2], ids=["one-stream", "two-streams"])
layouts = pytest.mark.parametrize("transposed", [False, True], ids=["K-contiguous", "N-contiguous"])


@pytest.fixture(scope="session")
def library(build_emulated):
    return build_emulated("lora_linear_sm90")


@pytest.fixture
def check(library, assert_right):
    """Runs a problem, looks that its outputs are right, and gives them back."""

    def check(problem, multiprocessors=2, seed=0):
        outputs = problem.emulate(library, "emulate_lora_linear_sm90", multiprocessors, seed)
        assert_right(problem, outputs)
        return outputs

    return check


@pytest.fixture
def obstacle(library):
    """Why the kernel does not compute a problem, or None."""
    library.lora_linear_sm90_obstacle.restype = ctypes.c_char_p

    def obstacle(problem, outputs=None):
        arguments = problem.arguments(problem.outputs() if outputs is None else outputs)
        reason = library.lora_linear_sm90_obstacle(ctypes.byref(arguments))
        return None if reason is None else reason.decode()

    return obstacle


@forms
@streams
@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_outputs_equal_the_reference(check, make_problem, form, streams, transposed, dtype):
    check(make_problem(200, 264, 136, 16, form=form, streams=streams, transposed=transposed, dtype=dtype))


@forms
@streams
@pytest.mark.parametrize(("k", "rank"), [(72, 8), (136, 8), (136, 40)])
def test_tiles_of_256_columns(check, make_problem, form, streams, k, rank):
    problem = make_problem(150, 520, k, rank, form=form, streams=streams, transposed=rank == 40)
    check(problem)  # of one cluster: 128 columns would take more waves


@forms
@streams
@pytest.mark.parametrize("scaling", [2.0, -40.0, 3e-4, 0.5, 0.0])
def test_the_scaled_low_rank_rows_have_the_range_of_float16_that_the_unscaled_have(
    check, make_problem, form, streams, scaling
):
    launch = make_problem(150, 264, 72, 8, form=form, streams=streams, dtype=torch.float16)
    problem = launch.problem
    large = launch.with_changes(
        scaling=scaling,
        shrink=12000 * problem.shrink,  # u to some 50,000
        d_shrink=None if problem.d_shrink is None else 120 * problem.d_shrink,
        expand=None if problem.expand is None else 1e-4 * problem.expand,
        d_expand=1e-4 * problem.d_expand,
    )
    assert check(large)["u"].abs().max() > 30_000


@forms
@pytest.mark.parametrize("primal", [True, False], ids=["both", "tangent-only"])
@pytest.mark.parametrize("tangent", [True, False], ids=["x_tangent", "no-x_tangent"])
def test_streams_that_are_absent(check, make_problem, form, tangent, primal):
    check(make_problem(200, 136, 72, 8, form=form, streams=2, tangent=tangent, primal=primal))


@streams
@pytest.mark.parametrize("rank", [1, 8, 31, 64, 100, 256])
def test_ranks(check, make_problem, rank, streams):
    check(make_problem(70, 136, 72, rank, streams=streams, transposed=rank % 2 == 0))


@streams
@pytest.mark.parametrize("m", [65, 128, 129, 256, 257])
def test_numbers_of_rows_around_the_tiles(check, make_problem, m, streams):
    check(make_problem(m, 40, 24, 3, streams=streams))


@layouts
@pytest.mark.parametrize(("n", "k"), [(8, 8), (128, 64), (136, 72), (248, 192)])
def test_columns_around_the_tiles(check, make_problem, n, k, transposed):
    check(make_problem(70, n, k, 5, transposed=transposed))


@streams
@layouts
def test_sides_that_are_no_multiple_of_anything_in_rows_that_are_padded(
    library, make_problem, assert_right, streams, transposed
):
    launch = make_problem(131, 77, 75, 13, streams=streams, transposed=transposed)
    problem = launch.problem
    launch = launch.with_changes(
        x=padded(problem.x),
        x_tangent=None if problem.x_tangent is None else padded(problem.x_tangent),
        weight=padded(problem.weight.T).T if transposed else padded(problem.weight),
    )
    outputs = {name: padded(output) for name, output in launch.outputs().items()}
    assert library.emulate_lora_linear_sm90(ctypes.byref(launch.arguments(outputs)), 2, 0) is None
    assert_right(launch, outputs)


def padded(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers, in rows of a multiple of 16 bytes with NaN between them."""
    rows, columns = matrix.shape
    wide = matrix.new_full((rows, (columns + 7) // 8 * 8 + 8), torch.nan)
    wide[:, :columns] = matrix
    return wide[:, :columns]


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32], ids=["factors-bf16", "factors-fp32"])
@layouts
def test_types_of_factors_and_bias(check, make_problem, factor_dtype, transposed):
    check(make_problem(70, 72, 40, 9, factor_dtype=factor_dtype, transposed=transposed))


def test_factors_of_any_strides(check, make_problem):
    launch = make_problem(70, 72, 40, 9)
    problem = launch.problem
    check(
        launch.with_changes(
            shrink=problem.shrink.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
            d_expand=problem.d_expand.repeat_interleave(5, 1)[:, ::5],
            bias=problem.bias.repeat_interleave(2)[::2],
        )
    )


def test_no_bias_and_nothing_to_save(check, make_problem):
    outputs = check(make_problem(70, 72, 40, 9, bias=False, saves=False))
    assert set(outputs) == {"y"}


@streams
def test_expand_without_d_shrink(library, make_problem, streams):
    launch = make_problem(70, 72, 40, 9, streams=streams)
    outputs = launch.with_changes(d_shrink=None).emulate(library, "emulate_lora_linear_sm90")
    zeros = launch.with_changes(d_shrink=torch.zeros_like(launch.problem.shrink))
    for name, output in zeros.emulate(library, "emulate_lora_linear_sm90").items():
        assert torch.equal(output, outputs[name]), name


def test_tensors_of_no_alignment_are_obstacles(obstacle, make_problem):
    assert obstacle(make_problem(100, 40, 24, 3)) is None
    assert "rows of x " in obstacle(make_problem(100, 40, 25, 3))
    assert "rows of y " in obstacle(make_problem(100, 41, 24, 3))
    unaligned = torch.randn(100 * 32 + 1).to(torch.bfloat16)[1:].view(100, 32)
    assert "rows of x " in obstacle(make_problem(100, 40, 32, 3).with_changes(x=unaligned))
    launch = make_problem(100, 40, 24, 3)
    assert "weight" in obstacle(launch.with_changes(weight=torch.randn(40, 48).to(torch.bfloat16)[:, ::2]))
    assert "rows of x " in obstacle(launch.with_changes(x=launch.problem.x.T.contiguous().T))


def test_what_other_kernels_do_is_an_obstacle(obstacle, make_problem):
    assert "64 rows" in obstacle(make_problem(64, 40, 24, 3))
    assert "float32" in obstacle(make_problem(100, 40, 24, 3, dtype=torch.float32))
    problem = make_problem(100, 40, 24, 3, form="short")
    assert "expand" in obstacle(problem, problem.outputs() | {"c": problem.problem.x.new_empty(100, 3)})


def test_a_problem_with_an_obstacle_is_not_launched(library, make_problem):
    problem = make_problem(20, 40, 24, 3)
    error = library.emulate_lora_linear_sm90(ctypes.byref(problem.arguments(problem.outputs())), 2, 0)
    assert "64 rows" in error.decode()
