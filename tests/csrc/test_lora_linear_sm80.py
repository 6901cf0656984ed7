"""The portable CUDA kernel on the emulated machine: every output against float64, under many schedules."""

import pytest
import torch

ROW, PANEL, SQUARE = "row", "panel", "square"  # the kernel's tile shapes
MULTIPROCESSORS = {ROW: 2, PANEL: 40, SQUARE: 1}  # with so many, problems of these many rows get these tiles
ROWS = {ROW: 9, PANEL: 70, SQUARE: 150}
RANKS = {ROW: 16, PANEL: 32, SQUARE: 64}  # that fit into one loop over K

forms = pytest.mark.parametrize("form", ["short", "pair"])
streams = pytest.mark.parametrize("streams", [1, 2], ids=["one-stream", "two-streams"])
shapes = pytest.mark.parametrize("shape", [ROW, PANEL, SQUARE])


@pytest.fixture(scope="session")
def library(build_emulated):
    return build_emulated("lora_linear_sm80")


@pytest.fixture
def check(library, assert_right):
    """Runs a problem, looks that its outputs are right, and gives them back."""

    def check(problem, multiprocessors=1, seed=0):
        outputs = problem.emulate(library, "emulate_lora_linear_sm80", multiprocessors, seed)
        assert_right(problem, outputs)
        return outputs

    return check


@forms
@streams
@shapes
@pytest.mark.parametrize("transposed", [False, True], ids=["K-contiguous", "N-contiguous"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_outputs_equal_the_reference(check, make_problem, shape, form, streams, transposed, dtype):
    problem = make_problem(
        ROWS[shape], 144, 136, 16, form=form, streams=streams, transposed=transposed, dtype=dtype
    )  # fmt: skip
    check(problem, MULTIPROCESSORS[shape])


@forms
@streams
@shapes
@pytest.mark.parametrize("transposed", [False, True], ids=["K-contiguous", "N-contiguous"])
def test_sides_that_are_no_multiple_of_anything(check, make_problem, shape, form, streams, transposed):
    problem = make_problem(ROWS[shape], 131, 75, 13, form=form, streams=streams, transposed=transposed)
    check(problem, MULTIPROCESSORS[shape])


@streams
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 129])
def test_numbers_of_rows_around_the_tiles(check, make_problem, m, streams):
    check(make_problem(m, 40, 24, 3, streams=streams), multiprocessors=1)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 40), (40, 1), (64, 8), (65, 7), (8, 300)])
def test_narrow_layers(check, make_problem, n, k):
    check(make_problem(5, n, k, 2))


@forms
@streams
@shapes
@pytest.mark.parametrize("rank", [1, 5, 64, 100, 256])
def test_ranks_of_one_block_and_of_several(check, make_problem, shape, form, streams, rank):
    check(make_problem(ROWS[shape], 72, 40, rank, form=form, streams=streams), MULTIPROCESSORS[shape])


@streams
@pytest.mark.parametrize("transposed", [False, True], ids=["K-contiguous", "N-contiguous"])
def test_factors_and_bias_in_the_dtype_of_x(check, make_problem, streams, transposed):
    check(make_problem(20, 70, 48, 24, streams=streams, factor_dtype=torch.bfloat16, transposed=transposed))


def test_factors_of_any_strides(check, make_problem):
    problem = make_problem(20, 70, 48, 24)
    for name in ("shrink", "d_shrink", "expand", "d_expand"):
        factor = getattr(problem.problem, name)
        spread = torch.full((factor.shape[0] * 2, factor.shape[1] * 3), torch.nan)
        spread[::2, ::3] = factor
        problem = problem.with_changes(**{name: spread[::2, ::3]})
    check(problem)


def test_activations_and_weight_of_any_strides(check, make_problem):
    launch = make_problem(20, 64, 48, streams=2)
    x, x_tangent, weight = launch.problem.x, launch.problem.x_tangent, launch.problem.weight
    check(
        launch.with_changes(
            x=x.repeat_interleave(2, 1)[:, ::2],
            x_tangent=x_tangent.T.contiguous().T,
            weight=torch.cat([weight, weight], 1)[:, :48],  # its rows go on beyond K
        )
    )


def test_a_row_that_all_examples_share(check, make_problem):
    launch = make_problem(20, 64, 48)
    check(launch.with_changes(x=launch.problem.x[:1].expand(20, 48)))


@streams
@shapes
@pytest.mark.parametrize("form", ["short", "pair"])
def test_without_bias(check, make_problem, shape, form, streams):
    check(make_problem(ROWS[shape], 64, 40, form=form, streams=streams, bias=False), MULTIPROCESSORS[shape])


@forms
@shapes
def test_without_an_input_tangent(check, make_problem, shape, form):
    check(make_problem(ROWS[shape], 64, 40, form=form, streams=2, tangent=False), MULTIPROCESSORS[shape])


@forms
@shapes
@pytest.mark.parametrize("tangent", [False, True], ids=["x", "x+x_tangent"])
def test_without_the_primal(check, make_problem, shape, form, tangent):
    problem = make_problem(ROWS[shape], 64, 40, form=form, streams=2, tangent=tangent, primal=False)
    assert set(check(problem, MULTIPROCESSORS[shape])) == {"y_tangent", "u"} | ({"c"} if form == "pair" else set())


@streams
def test_without_the_products_for_the_backward(check, make_problem, streams):
    check(make_problem(20, 64, 40, streams=streams, saves=False))


def test_a_tangent_a_thousand_times_smaller_survives(library, make_problem):
    launch = make_problem(20, 64, 48)
    launch = launch.with_changes(d_shrink=launch.problem.d_shrink / 1000, d_expand=launch.problem.d_expand / 1000)
    problem, outputs = launch.problem, launch.emulate(library, "emulate_lora_linear_sm80")
    change = outputs["c"].double() - outputs["u"].double()
    exact = problem.x.double() @ problem.d_shrink.double().T
    rounding = torch.finfo(torch.bfloat16).eps * outputs["u"].double().abs().max()
    assert (change - exact).abs().max() <= rounding


@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 40), (5, 0, 40), (5, 64, 0)])
def test_empty_sides(library, make_problem, composed, m, n, k):
    launch = make_problem(m, n, k)
    outputs = launch.emulate(library, "emulate_lora_linear_sm80")
    for name, exact in composed(launch.problem).items():
        torch.testing.assert_close(outputs[name], exact, rtol=1e-2, atol=1e-2)


@forms
@streams
@shapes
def test_every_schedule_gives_the_same_bits(check, library, make_problem, shape, form, streams):
    problem = make_problem(ROWS[shape], 136, 72, RANKS[shape] + 3, form=form, streams=streams)
    few, many = {ROW: (1, 3), PANEL: (9, 40), SQUARE: (1, 2)}[shape]
    expected = check(problem, few)
    threads = library.emulated_launch().contents.threads
    for multiprocessors, seed in ((few, 1), (few, 2), (many, 0), (many, 3)):
        outputs = problem.emulate(library, "emulate_lora_linear_sm80", multiprocessors, seed)
        assert library.emulated_launch().contents.threads == threads, "another tile shape: not comparable"
        for name, output in outputs.items():
            assert torch.equal(output, expected[name]), f"{name} on {multiprocessors} multiprocessors, seed {seed}"


@streams
@shapes
@pytest.mark.parametrize("transposed", [False, True], ids=["K-contiguous", "N-contiguous"])
def test_the_loop_over_k_has_no_bank_conflicts(library, make_problem, shape, streams, transposed):
    def conflicts(k):
        problem = make_problem(64, 128, k, RANKS[shape], streams=streams, transposed=transposed)
        problem.emulate(library, "emulate_lora_linear_sm80", MULTIPROCESSORS[shape])
        return library.emulated_launch().contents.bank_conflicts

    assert conflicts(512) == conflicts(128)


@streams
@shapes
def test_shared_memory_fits_every_gpu(library, make_problem, shape, streams):
    make_problem(ROWS[shape], 64, 40, streams=streams).emulate(
        library, "emulate_lora_linear_sm80", MULTIPROCESSORS[shape]
    )
    assert library.emulated_launch().contents.shared_bytes <= 99 * 1024
