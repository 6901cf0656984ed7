"""Sums of vectors against their formulas, what every method refuses, and how many vectors it holds."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linlora
from linlora import TaskVector
from linlora.fusion import METHODS, needs
from linlora.fusion.registry import FROM_VECTORS, IN_WEIGHT_SPACE
from linlora.storage.tensors import holding
from linlora.testing import tiny_model

SUMS = ("average", "task_arithmetic", "negation")
ONE_PASS = tuple(method for method in FROM_VECTORS if method not in IN_WEIGHT_SPACE)
NEEDED = {
    "lorahub": {"objective": float}, "adamerging": {"model": None, "inputs": []}, "regmean": {"inputs": []},
    "soup": {"model": None, "batches": []},
}  # fmt: skip


def test_average(vectors, flat):
    a, b, c = map(flat, vectors)
    torch.testing.assert_close(flat(linlora.fuse(vectors, "average")), (a + b + c) / 3, rtol=1e-6, atol=1e-7)


def test_task_arithmetic_with_one_scaling_and_with_one_each(vectors, flat):
    a, b, c = map(flat, vectors)
    torch.testing.assert_close(flat(linlora.fuse(vectors)), 0.3 * (a + b + c), rtol=1e-6, atol=1e-7)
    each = linlora.fuse(vectors, scaling=[1, -2, 0.5])
    torch.testing.assert_close(flat(each), a - 2 * b + 0.5 * c, rtol=1e-6, atol=1e-7)


def test_scalings_may_be_numbers_of_numpy_and_torch(made, flat):
    vectors = made([1.0, 2.0], [3.0, -2.0])
    for one in (np.float32(0.5), torch.tensor(0.5)):
        assert flat(linlora.fuse(vectors, scaling=one)).tolist() == [2.0, 0.0]
    for each in (np.array([1, -2]), torch.tensor([1.0, -2.0])):
        assert flat(linlora.fuse(vectors, scaling=each)).tolist() == [-5.0, 6.0]


def cast(vector, dtype):
    return replace(vector, deltas={name: delta.to(dtype) for name, delta in vector.deltas.items()})


def test_negation(vectors, flat):
    a, b, c = map(flat, vectors)
    torch.testing.assert_close(flat(linlora.fuse(vectors[:1], "negation")), -a)
    torch.testing.assert_close(
        flat(linlora.fuse(vectors, "negation", scaling=0.5)), -0.5 * (a + b + c), atol=1e-6, rtol=0
    )


def test_fused_delta_weight_is_the_sum_of_the_delta_weights():
    """What layer scope is for: no cross terms. For plain LoRA factors the same sum is off by B_i A_j."""
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    vectors = []
    for seed in (1, 2, 3):
        linlora.testing.randomize(model, seed, ("lora_dA", "lora_dB"))
        vectors.append(TaskVector.from_model(model))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    changes = []
    for vector in (0.0 * vectors[0], *vectors, linlora.fuse(vectors, scaling=1.0)):
        linlora.apply(model, vector)
        changes.append(layer.get_delta_weight("default"))
    start, a, b, c, fused = changes
    torch.testing.assert_close(fused - start, a + b + c - 3 * start, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ONE_PASS)
def test_scope_point_and_dtype_are_the_vectors(vectors, method):
    fused = linlora.fuse(vectors, method)
    fused.check_same_point(vectors[0])
    assert {delta.dtype for delta in fused.deltas.values()} == {torch.float32}


def test_sums_in_bfloat16_are_rounded_once(made):
    vectors = made(*[[1.0, 0.00390625]] * 512, dtype=torch.bfloat16)
    fused = linlora.fuse(vectors, scaling=1.0)
    assert fused.deltas["q.dB"].tolist() == [512.0, 2.0]  # a bfloat16 sum stops growing at 256 and at 1
    assert fused.deltas["q.dB"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ONE_PASS)
def test_the_vectors_are_left_alone(vectors, flat, method):
    before = [flat(vector) for vector in vectors]
    linlora.fuse(vectors, method)
    assert all(torch.equal(flat(vector), values) for vector, values in zip(vectors, before, strict=True))


@pytest.mark.parametrize("method", ONE_PASS)
def test_a_generator_is_gone_through_once_with_one_vector_alive(made, flat, method):
    rows = torch.randn(6, 50).tolist()
    alive, peak = set(), 0

    def load():
        nonlocal peak
        for index, row in enumerate(rows):
            (vector,) = made(row)
            weakref.finalize(vector.deltas["q.dB"], alive.discard, index)
            alive.add(index)
            peak = max(peak, len(alive))
            box = [vector]
            del vector
            yield box.pop()

    fused = linlora.fuse(load(), method)
    assert peak == 1
    torch.testing.assert_close(flat(fused), flat(linlora.fuse(made(*rows), method)), rtol=1e-5, atol=1e-6)


eighths = st.integers(-64, 64).map(lambda numerator: numerator / 8)
numbers = st.lists(st.lists(eighths, min_size=5, max_size=5), min_size=1, max_size=5)


@pytest.mark.parametrize("method", [method for method in ONE_PASS if method != "dare"])  # whose masks have places
def test_the_order_of_the_vectors_changes_no_bit(vectors, flat, tmp_path, method):
    """Wherever they lie; scalings are given in the order of the vectors."""
    vectors = [*vectors, *(0.7 * vector for vector in vectors)]
    for index, vector in enumerate(vectors):
        vector.save(tmp_path / str(index))
    weights = [0.3, -1.0, 0.5, 0.1, 2.0, -0.7]
    found = set()
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 3, 4]):
        options = {"scaling": [weights[i] for i in order]} if method == "task_arithmetic" else {}
        for ordered in ([vectors[i] for i in order], [TaskVector.open(tmp_path / str(i)) for i in order]):
            found.add(tuple(flat(linlora.fuse(ordered, method, **options)).tolist()))
    assert len(found) == 1


DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_vectors_of_two_dtypes_fuse_in_one_that_holds_both(made, method, first, second):
    """To what copies in float64 fuse to, rounded once."""
    (u,), (v,) = made([0.5, -0.375, 1.5, 0.0625], dtype=first), made([0.25, 3.0, -1.75, 2.0], dtype=second)
    exact = linlora.fuse([cast(vector, torch.float64) for vector in (u, v)], method).deltas["q.dB"]
    for pair in ([u, v], [v, u]):
        fused = linlora.fuse(pair, method).deltas["q.dB"]
        assert fused.dtype == holding(first, second)
        torch.testing.assert_close(fused.double(), exact.to(fused.dtype).double(), rtol=3e-7, atol=0.0)


def test_a_generator_whose_vectors_become_wider(made, flat):
    """Sums are in float32 as long as no vector needs more."""
    half, single, double = (made([1.0], dtype=dtype)[0] for dtype in (torch.bfloat16, torch.float32, torch.float64))
    for pair in ((half, single), (single, half)):
        fused = linlora.fuse(iter(pair), "average").deltas["q.dB"]
        assert (fused.dtype, fused.tolist()) == (torch.float32, [1.0])
    with pytest.raises(ValueError, match=r"'q\.dB' of vector 2 is torch\.float64, wider than .* in a list"):
        linlora.fuse(iter((single, double)), "average")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "negation", "dare"])
def test_a_result_that_is_not_finite_is_refused(made, tmp_path, method, dtype):
    large = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) if dtype != torch.float64 else 1e308
    for row, options, message in (
        ([large, 1.0], {"scaling": 1.0}, r"'q.dB' (overflows in torch|is not finite)"),
        ([float("nan"), 1.0], {}, "'q.dB' is not finite: a vector holds NaN or infinity"),
    ):
        options = {"drop": 0.0, **options} if method == "dare" else options if method != "average" else {}
        if method == "average" and message.startswith("'q.dB' ("):
            continue
        with pytest.raises(ValueError, match=message):
            linlora.fuse(made(row, row, dtype=dtype), method, **options)


def test_vectors_of_two_base_models_do_not_add(made):
    """They may have one starting point: A0 of one seed, at B0 = 0."""
    u, v, w = (replace(made([1.0])[0], base_model=name) for name in (None, "org/Base-7B", "org/Base-13B"))
    for combine in (
        lambda: v + w,
        lambda: v.dot(w),
        lambda: linlora.fuse([u, v, w]),
        lambda: linlora.fuse(iter((u, v, w))),
    ):
        with pytest.raises(linlora.DifferentPointError, match=r"'org/Base-7B' and 'org/Base-13B'\. If the two are the"):
            combine()
    cached = replace(u, base_model="/cache/models--org--Base-7B/snapshots/0a1b2c")
    for one in (u + v, v + u, cached - v, linlora.fuse([u, cached, v]), linlora.fuse(iter((u, cached, v)), "ties")):
        assert one.base_model == "org/Base-7B"


@given(rows=numbers, exponent=st.integers(-3, 3), sign=st.sampled_from([1.0, -1.0]))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("method", ONE_PASS)
def test_scaled_vectors_fuse_to_the_scaled_vector(made, flat, method, rows, exponent, sign):
    """Also by a negative factor. Powers of two are exact, so that no sum changes its sign, nor with its order."""
    factor = sign * 2.0**exponent
    vectors = made(*rows)
    options = {"task_arithmetic": {"scaling": 0.25}, "dare": {"drop": 0.5, "scaling": 0.25}}.get(method, {})
    fused = linlora.fuse([factor * vector for vector in vectors], method, **options)
    assert torch.equal(flat(fused), factor * flat(linlora.fuse(vectors, method, **options)))


class TestRefusals:
    @pytest.mark.parametrize("method", METHODS)
    def test_no_vectors(self, method):
        with pytest.raises(ValueError, match="no vectors"):
            linlora.fuse([], method, **NEEDED.get(method, {}))

    def test_unknown_method(self, made):
        with pytest.raises(ValueError, match="unknown method 'magic'; choose one of average, task_arithmetic, ties, "):
            linlora.fuse(made([1.0]), "magic")

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("average", {"scaling": 1.0}, "average takes no option 'scaling'; its options are out_rank, energy"),
            ("ties", {"density": 0.2}, "ties takes no option 'density'; its options are keep, scaling"),
            ("dare", {"keep": 0.2}, r"dare \(combine='task_arithmetic'\) takes no option 'keep'; its"),
            ("dare", {"combine": "ties", "k": 2}, r"\(combine='ties'\) takes no option 'k'; its options are keep"),
            ("dare", {"combine": "average"}, "unknown way to combine 'average'; choose one of task_arithmetic, ties"),
            ("lorahub", {}, "lorahub needs the option 'objective'; its options are objective, budget"),
            ("adamerging", {}, "adamerging needs the option 'model'; its options are model, inputs, level"),
            ("task_arithmetic", {"scaling": float("nan")}, "task_arithmetic: scaling has to be finite"),
            ("task_arithmetic", {"scaling": [1.0, float("inf")]}, "task_arithmetic: scaling has to be finite"),
            ("task_arithmetic", {"scaling": [1.0]}, "1 scalings for 2 vectors"),
            ("task_arithmetic", {"scaling": [1.0, 2.0, 3.0]}, "3 scalings for 2 vectors"),
            ("negation", {"scaling": float("inf")}, "negation: scaling has to be a finite number"),
            ("negation", {"scaling": [1.0, 2.0]}, "negation: scaling has to be a finite number"),
            ("ties", {"scaling": float("nan")}, "ties: scaling has to be a finite number"),
            ("ties", {"keep": 0.0}, "keep is the part of the values kept, above 0 and at most 1, got 0.0"),
            ("ties", {"keep": 20}, "keep is the part of the values kept, above 0 and at most 1, got 20"),
            ("dare", {"drop": 1.0}, "drop is a probability, at least 0 and below 1"),
            ("dare", {"scaling": float("nan")}, "dare: scaling has to be finite"),
            ("lorahub", {"objective": float, "budget": 0}, "budget has to be a whole number, at least 1"),
            ("lorahub", {"objective": float, "budget": 2.5}, "budget has to be a whole number, at least 1, got 2.5"),
            ("task_arithmetic", {"scaling": None}, "task_arithmetic: scaling has to be finite, got None"),
            ("lorahub", {"objective": float, "bound": float("nan")}, "lorahub: bound has to be a finite number"),
        ],
    )  # fmt: skip
    def test_options(self, made, method, options, message):
        with pytest.raises(ValueError, match=message):
            linlora.fuse(made([1.0, 2.0], [3.0, 4.0]), method, **options)

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in IN_WEIGHT_SPACE])
    def test_vectors_that_do_not_add(self, made, method):
        options = NEEDED.get(method, {})
        u, v = made([1.0], [2.0])
        for other, message in (
            (replace(v, point_hash="other"), "different linearization points"),
            (replace(v, scope="model"), "scope 'layer' and one of scope 'model'.*--cast layer"),
            (replace(v, deltas={"k.dB": torch.ones(1)}), "cover different layers"),
        ):
            with pytest.raises(linlora.DifferentPointError, match=message):
                linlora.fuse([u, other], method, **options)

    def test_what_is_no_vector(self):
        with pytest.raises(TypeError, match="a TaskVector is expected, got str"):
            linlora.fuse(["vector.safetensors"])


def test_a_method_says_what_it_needs():
    wanted = {"lorahub": "examples", "soup": "examples", "adamerging": "inputs", "regmean": "inputs"}
    assert {method: needs(method) for method in METHODS if needs(method) != "nothing"} == wanted
