"""Methods in weight space against the same formulas on dense ΔW, computed apart in float64."""

import pytest
import torch

import linlora
from linlora import DifferentPointError, TaskVector, WeightVector
from linlora.fusion import METHODS
from linlora.fusion.registry import IN_WEIGHT_SPACE
from linlora.fusion.truncation import basis
from linlora.storage.tensors import StoredTensors
from linlora.testing import relative_error
from linlora.vectors.points import point_hash

LAYERS = {"q": (24, 20), "k": (18, 30)}
SPECTRAL = ["tsv", "iso_c", "iso_cts", "wudi_minimiser"]
IN_WEIGHTS = [name for name in IN_WEIGHT_SPACE if name != "soup"]  # which needs a model


def adapter(seed, rank=3, layers=LAYERS, dtype=torch.float32, scaling=2.0):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        outputs, inputs = LAYERS[layer]
        deltas[f"{layer}.dA"] = torch.randn(rank, inputs, generator=generator, dtype=torch.float64).to(dtype)
        deltas[f"{layer}.dB"] = torch.randn(outputs, rank, generator=generator, dtype=torch.float64).to(dtype)
    return WeightVector(deltas, {}, point_hash({}), dict.fromkeys(layers, scaling), "weight")


def dense(vector):
    """ΔW of every layer in float64, zeros where it is absent."""
    found = {}
    for layer, shape in LAYERS.items():
        found[layer] = torch.zeros(shape, dtype=torch.float64)
        if layer in vector.scalings:
            A, B = (vector.deltas[f"{layer}.{kind}"].double() for kind in ("dA", "dB"))
            found[layer] = vector.scalings[layer] * B @ A
    return found


def error(vector, expected):
    found = dense(vector)
    return relative_error(
        torch.cat([found[layer].flatten() for layer in LAYERS]), torch.cat([expected[n].flatten() for n in LAYERS])
    )


def by_layer(rule):
    """An oracle: a rule of a layer's dense matrices, those that are not absent."""
    return lambda vectors: {
        layer: rule([dense(vector)[layer] for vector in vectors if layer in vector.scalings]) for layer in LAYERS
    }


def svd(matrix, rank=None, size=0.0):
    """The singular triplets of a matrix of a known rank, or of all values above rounding, of a size it came from."""
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-9 * max(1e-300, float(s[0]), size)).sum()) if rank is None else rank
    return U[:, :rank], s[:rank], Vt[:rank].T


def polar(matrix):
    U, _, V = svd(matrix)
    return U @ V.T


def tsv(matrices):
    U, s, V = (torch.cat(parts, -1) for parts in zip(*map(svd, matrices), strict=True))
    return polar(U) @ torch.diag(s) @ polar(V).T


def iso_c(matrices):
    U, s, V = svd(sum(matrices))
    return s.mean() * U @ V.T


def iso_cts(matrices):
    n = min(svd(torch.cat(matrices, 1))[1].numel(), svd(torch.cat([m.T for m in matrices], 1))[1].numel())
    own = round((n - int(0.8 * n)) / len(matrices))
    U, s, V = svd(sum(matrices))
    U, s, V = U[:, : n - own * len(matrices)], s[: n - own * len(matrices)], V[:, : n - own * len(matrices)]
    left, values, right = [U], [s], [V]
    for matrix in matrices:
        P, t, Q = svd(matrix - U @ U.T @ matrix, size=float(matrix.norm()))
        left.append(P[:, :own]), values.append(t[:own]), right.append(Q[:, :own])
    return torch.cat(values).mean() * polar(torch.cat(left, 1)) @ polar(torch.cat(right, 1)).T


def wudi_minimiser(matrices):
    matrices = [matrix for matrix in matrices if matrix.any()] or matrices[:1]
    grams = [m.T @ m / max(1e-300, m.norm()) ** 2 for m in matrices]
    top = sum(m @ gram for m, gram in zip(matrices, grams, strict=True))
    return top @ torch.linalg.pinv(sum(grams), hermitian=True, rtol=1e-9)


def trim(parts, keep):
    flat = torch.cat([part.flatten().abs() for part in parts]).sort(descending=True).values
    smallest = flat[max(1, int(keep * len(flat))) - 1]
    return [torch.where(part.abs() >= smallest * (1 - 1e-6), part, 0.0) for part in parts]


def disjoint_mean(parts):
    stacked = torch.stack(parts)
    total = torch.where(stacked.sum(0).abs() > 1e-9 * stacked.abs().sum(0), stacked.sum(0), 0.0)
    agree = (stacked.sign() == total.sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def knots_ties(vectors):
    bases, tasks = {}, [{} for _ in vectors]
    for layer in LAYERS:
        there = [i for i, vector in enumerate(vectors) if layer in vector.scalings]
        U, s, V = svd(torch.cat([dense(vectors[i])[layer] for i in there], 1))
        bases[layer] = U
        for i, block in zip(there, (torch.diag(s) @ V.T).split(LAYERS[layer][1], 1), strict=True):
            tasks[i][layer] = block
    trimmed = [dict(zip(task, trim(list(task.values()), 0.2), strict=True)) for task in tasks]
    return {
        layer: 0.6 * bases[layer] @ disjoint_mean([task[layer] for task in trimmed if layer in task])
        for layer in LAYERS
    }


def compress_then_merge(rank):
    """Higher-order orthogonal iteration by dense SVDs, as the paper states it, on the support."""

    def rule(matrices):
        def first(stack):
            return svd(torch.cat(stack, 1))[0][:, :rank]

        norms = [matrix.norm() for matrix in matrices]
        mean = sum(norms) / len(norms)
        drawn = [m * (0.25 + 0.75 * mean / norm) for m, norm in zip(matrices, norms, strict=True) if norm > 0.0]
        whole = sum(m.square().sum() for m in drawn)
        left, right, errors = first(drawn), first([m.T for m in drawn]), []
        while len(errors) < 3 or abs(errors[-1] - errors[-2]) >= 1e-6:
            left = first([m @ right for m in drawn])
            right = first([m.T @ left for m in drawn])
            inside = sum((left.T @ m @ right).square().sum() for m in drawn)
            errors.append(float((whole - inside).abs() / whole) ** 0.5)
        cores = [trim([left.T @ m @ right], 0.25)[0] for m in matrices]
        return 0.75 * left @ disjoint_mean(cores) @ right.T

    return rule


ORACLES = {
    **{name: by_layer(rule) for name, rule in [
        ("tsv", tsv), ("iso_c", iso_c), ("iso_cts", iso_cts), ("wudi_minimiser", wudi_minimiser)
    ]},
    "knots_ties": knots_ties,
    "average": lambda vectors: {n: sum(dense(vector)[n] for vector in vectors) / len(vectors) for n in LAYERS},
    "negation": by_layer(lambda matrices: -sum(matrices)),
}  # fmt: skip
SETS = {
    "ranks and layers that differ": lambda: [
        adapter(1, 2),
        adapter(2, 5, ("q",)),
        adapter(3, 4),
        adapter(4, 1, ("k",)),
    ],
    "near equal": lambda: [near_equal(seed) for seed in (1, 2, 3)],
    "more ranks than rows": lambda: [adapter(1, 9), adapter(2, 9), adapter(3, 9)],
    "rank deficient": lambda: [deficient(1), adapter(2), deficient(3)],
    "equal and negated": lambda: [adapter(1), adapter(1), -adapter(2), adapter(3)],
    "one": lambda: [adapter(1)],
    "all equal": lambda: [adapter(1, dtype=torch.bfloat16)] * 4,
    "no layer in common": lambda: [adapter(1, 2, ("q",)), adapter(2, 3, ("k",))],
    "dtypes that differ": lambda: [
        adapter(1, 2, dtype=torch.bfloat16),
        adapter(2, 5, ("q",)),
        adapter(3, 4, dtype=torch.float16),
        adapter(4, 1, ("k",), dtype=torch.float64),
    ],
    "scalings that differ": lambda: [adapter(1, scaling=0.5), adapter(2, 5, scaling=-3.0), adapter(3, 1, scaling=0.01)],
    "one zero": lambda: [adapter(1), 0.0 * adapter(2), adapter(3)],
    "one A": lambda: [with_A_of(adapter(9), adapter(seed)) for seed in (1, 2, 3)],
    "factors of 1e-18": lambda: [of_size(1e-18, adapter(1)), of_size(1e-18, adapter(2))],
    "columns in another order": lambda: [adapter(1, 4), turned(adapter(1, 4)), adapter(2)],
    "float64": lambda: [adapter(1, dtype=torch.float64), adapter(2, dtype=torch.float64)],
}


def near_equal(seed):
    """One start and a change of a hundredth of it: columns that are nearly dependent."""
    start, change = adapter(9), adapter(seed)
    deltas = {name: start.deltas[name] + 1e-2 * change.deltas[name] for name in start.deltas}
    return WeightVector(deltas, {}, start.point_hash, start.scalings, "weight")


def with_A_of(start, vector):
    deltas = {name: (start if name.endswith("dA") else vector).deltas[name] for name in vector.deltas}
    return WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight")


def of_size(size, vector):
    deltas = {name: size * delta for name, delta in vector.deltas.items()}
    return WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight")


def turned(vector):
    """The same ΔW by the same columns, the last first."""
    deltas = {name: delta.flip(0 if name.endswith("dA") else 1) for name, delta in vector.deltas.items()}
    return WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight")


def deficient(seed):
    vector = adapter(seed, 4)
    for layer in LAYERS:
        vector.deltas[f"{layer}.dB"][:, 1] = 2.0 * vector.deltas[f"{layer}.dB"][:, 0]
        vector.deltas[f"{layer}.dA"][3] = 0.0
    return vector


@pytest.mark.parametrize("given", SETS, ids=[name.replace(" ", "-") for name in SETS])
@pytest.mark.parametrize("method", ORACLES)
def test_a_method_is_its_formula_on_dense_matrices(method, given):
    vectors = SETS[given]()
    assert error(linlora.fuse(vectors, method), ORACLES[method](vectors)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("given", SETS, ids=[name.replace(" ", "-") for name in SETS])
def test_compress_then_merge_is_its_formula_on_dense_matrices(given, rank):
    vectors = SETS[given]()
    expected = by_layer(compress_then_merge(rank))(vectors)
    assert error(linlora.fuse(vectors, "compress_then_merge", rank=rank), expected) < 1e-5


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi_minimiser"])
def test_published_forms_agree_where_ranks_are_full(method):
    """There they have no null vectors to choose: singular triplets of dense matrices, all of them."""
    vectors = [adapter(1, 24), adapter(2, 24)]
    matrices = [dense(vector)["q"] for vector in vectors]
    if method == "tsv":  # the published share of each task is min(N, K) / T
        halves = [svd(matrix, 10) for matrix in matrices]
        U, s, V = (torch.cat(parts, -1) for parts in zip(*halves, strict=True))
        expected = polar(U) @ torch.diag(s) @ polar(V).T
        vectors = [linlora.fuse([vector], "average", out_rank=10) for vector in vectors]
    else:
        expected = ORACLES[method](vectors)["q"]
    assert relative_error(dense(linlora.fuse(vectors, method))["q"], expected) < 1e-5


@pytest.mark.parametrize("method", ["tsv", "wudi_minimiser", "knots_ties"])
def test_equal_adapters_fuse_to_that_adapter(method):
    options = {"keep": 1.0, "scaling": 1.0} if method == "knots_ties" else {}
    one = adapter(1)
    for copies in ([one] * 3, [one, deficient_twin(one)]):
        assert error(linlora.fuse(copies, method, **options), dense(one)) < 1e-5


def deficient_twin(vector):
    """The same ΔW in other factors of twice the rank."""
    deltas = {}
    for layer in vector.scalings:
        A, B = vector.deltas[f"{layer}.dA"], vector.deltas[f"{layer}.dB"]
        deltas[f"{layer}.dA"] = torch.cat([3.0 * A, A])
        deltas[f"{layer}.dB"] = torch.cat([B / 4.0, B / 4.0], 1)
    return WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight")


@pytest.mark.parametrize("method", IN_WEIGHTS)
def test_zero_and_cancelling_adapters(method):
    one, zero = adapter(1), 0.0 * adapter(2)
    nothing = {layer: torch.zeros(shape).double() for layer, shape in LAYERS.items()}
    for vectors in ([zero], [zero, zero], [one, -one]):
        found = dense(linlora.fuse(vectors, method))
        assert max(float(found[layer].norm()) for layer in LAYERS) < 1e-5
    if method in ORACLES:
        fused = linlora.fuse([one, adapter(3), -one, adapter(4)], method)
        assert error(fused, ORACLES[method]([one, adapter(3), -one, adapter(4)])) < 1e-5
    beside = linlora.fuse([one, zero, adapter(3)], method)
    if method in ORACLES and method != "iso_cts":  # which shares directions out between all, the zero one too
        assert error(beside, ORACLES[method]([one, adapter(3)])) < 1e-5
    assert error(beside, nothing) > 0.0


@pytest.mark.parametrize("method", IN_WEIGHTS)
def test_a_method_is_free_of_scale_order_and_the_split_between_A_and_B(method):
    vectors = SETS["ranks and layers that differ"]()
    fused = linlora.fuse(vectors, method)
    assert error(linlora.fuse([1e-3 * vector for vector in vectors], method) * 1e3, dense(fused)) < 1e-5
    moved = []
    for vector, factor in zip(vectors, (1e-3, 1.0, 50.0, 1e4), strict=True):
        deltas = {n: delta * (factor if n.endswith("dA") else 1 / factor) for n, delta in vector.deltas.items()}
        moved.append(WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight"))
    assert error(linlora.fuse(moved, method), dense(fused)) < 1e-5
    other = linlora.fuse([vectors[i] for i in (2, 0, 3, 1)], method)
    assert all(torch.equal(fused.deltas[name], other.deltas[name]) for name in fused.deltas)


@pytest.mark.parametrize("method", IN_WEIGHTS)
def test_from_files_is_from_memory_bit_for_bit(method, tmp_path):
    vectors = SETS["ranks and layers that differ"]()
    for index, vector in enumerate(vectors):
        vector.save(tmp_path / str(index))
    fused = linlora.fuse([TaskVector.open(tmp_path / str(index)) for index in range(len(vectors))], method)
    assert isinstance(fused.deltas, StoredTensors)
    fused.save(tmp_path / "fused")
    loaded, expected = TaskVector.load(tmp_path / "fused"), linlora.fuse(vectors, method)
    assert all(torch.equal(loaded.deltas[name], expected.deltas[name]) for name in expected.deltas)


@pytest.mark.parametrize("method", [*IN_WEIGHTS, "average"])
@pytest.mark.parametrize("options", [{}, {"out_rank": 2}], ids=["exact", "cut"])
def test_threads_change_no_bit(method, options):
    if method == "compress_then_merge":
        options = {"rank": 2} if options else {}
    vectors = [of_many_layers(vector) for vector in SETS["rank deficient"]()]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(linlora.fuse(vectors, method, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].deltas[name], found[1].deltas[name]) for name in found[0].deltas)


def of_many_layers(vector):
    deltas = {f"{number}.{name}": delta for name, delta in vector.deltas.items() for number in range(4)}
    scalings = {f"{number}.{name}": s for name, s in vector.scalings.items() for number in range(4)}
    return WeightVector(deltas, {}, vector.point_hash, scalings, "weight")


def test_compress_then_merge_is_exact_where_the_rank_holds_all():
    """U₀ and U₁ hold everything, so TIES of the core with all values kept is TIES in a rotated ΔW."""
    vectors = [adapter(1, 2), adapter(2, 2)]
    matrices = [dense(vector) for vector in vectors]
    one = linlora.fuse(vectors[:1], "compress_then_merge", rank=2, keep=1.0, scaling=1.0)
    assert error(one, matrices[0]) < 1e-5
    for rank in (1, 3):
        fused = linlora.fuse(vectors, "compress_then_merge", rank=rank)
        assert all(torch.linalg.matrix_rank(matrix, rtol=1e-6) <= rank for matrix in dense(fused).values())


class TestTruncation:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_the_cut_is_the_best_there_is_and_says_its_error(self, rank, dtype):
        vectors = [adapter(seed, 4, dtype=dtype) for seed in range(3)]
        exact = {layer: sum(dense(vector)[layer] for vector in vectors) for layer in LAYERS}
        values = {layer: torch.linalg.svdvals(matrix) for layer, matrix in exact.items()}
        fused = linlora.fuse(vectors, scaling=1.0, out_rank=rank)
        best = sum(float(s[rank:].square().sum()) for s in values.values()) ** 0.5
        norm = sum(float(s.square().sum()) for s in values.values()) ** 0.5
        found = dense(fused)
        lost = sum(float((exact[layer] - found[layer]).square().sum()) for layer in LAYERS) ** 0.5
        assert lost == pytest.approx(best, rel=1e-4)
        assert fused.truncation_error == pytest.approx(best / norm, rel=1e-5)
        assert {size.rank for size in fused.sizes().values()} == {rank}

    def test_energy_keeps_the_least_rank_that_holds_it(self):
        vectors = [adapter(seed, 4) for seed in range(3)]
        exact = {layer: sum(dense(vector)[layer] for vector in vectors) for layer in LAYERS}
        fused = linlora.fuse(vectors, scaling=1.0, energy=0.9)
        for layer, size in fused.sizes().items():
            kept = torch.linalg.svdvals(exact[layer]).square().cumsum(0)
            assert kept[size.rank - 1] >= 0.9 * kept[-1] > kept[size.rank - 2]
        assert fused.truncation_error <= 0.1**0.5

    def test_a_rank_that_is_larger_than_there_is_is_exact(self):
        fused = linlora.fuse([adapter(1), adapter(1)], "average", out_rank=64)
        assert error(fused, dense(adapter(1))) < 1e-6
        assert fused.truncation_error == 0.0
        assert {size.rank for size in fused.sizes().values()} == {3}

    @pytest.mark.parametrize("size", [1.0, 1e-6])
    def test_adapters_that_cancel_leave_one_zero_of_rank_one(self, size):
        one = size * adapter(1)
        fused = linlora.fuse([one, adapter(2), -one, -adapter(2)], "average", out_rank=4)
        assert {s.rank for s in fused.sizes().values()} == {1}
        assert fused.norm() == fused.truncation_error == 0.0

    def test_the_error_is_kept_in_the_file(self, tmp_path):
        fused = linlora.fuse([adapter(1), adapter(2)], "tsv", out_rank=2)
        assert 0.0 < fused.truncation_error < 1.0
        fused.save(tmp_path / "v")
        assert TaskVector.load(tmp_path / "v").truncation_error == fused.truncation_error
        assert (0.5 * fused).truncation_error == fused.truncation_error

    @pytest.mark.parametrize("method", ["average", "task_arithmetic", *SPECTRAL, "knots_ties"])
    def test_of_every_method_it_is_the_best_of_its_result(self, method):
        vectors = SETS["ranks and layers that differ"]()
        exact = dense(linlora.fuse(vectors, method))
        cut = {}
        for layer, matrix in exact.items():
            U, s, V = svd(matrix, 2)
            cut[layer] = U @ torch.diag(s) @ V.T
        found = dense(linlora.fuse(vectors, method, out_rank=2))
        for layer, matrix in exact.items():
            ours, best = (matrix - found[layer]).norm(), (matrix - cut[layer]).norm()
            assert ours == pytest.approx(float(best), rel=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"out_rank": 0}, "out_rank has to be a whole number, at least 1, or 'exact', got 0"),
            ({"out_rank": "half"}, "got 'half'"),
            ({"energy": 1.5}, "energy is the part of Σ σ² kept, above 0 and at most 1, got 1.5"),
            ({"out_rank": 2, "energy": 0.9}, "give one of them"),
        ],
    )
    def test_what_is_no_cut(self, options, message):
        with pytest.raises(ValueError, match=message):
            linlora.fuse([adapter(1)], "average", **options)

    def test_vectors_of_one_point_have_no_rank_to_cut(self, made):
        with pytest.raises(ValueError, match=r"out_rank and energy cut what adapters add"):
            linlora.fuse(made([1.0]), "average", out_rank=2)


def test_a_basis_spans_columns_of_any_length_and_dependence():
    columns = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns[:, 1], columns[:, 2], columns[:, 3] = 2.0 * columns[:, 0], 0.0, columns[:, 4] + 1e-9 * columns[:, 5].sin()
    columns[:, 6] *= 1e-30
    U, inside = basis(columns)
    found = U.times(torch.eye(18).double())
    assert relative_error(inside, found.T @ columns) < 1e-12
    assert (found.T @ found - torch.eye(18)).abs().max() < 1e-12
    left = (columns - found @ (found.T @ columns)).norm(dim=0)
    assert (left <= 1e-12 * columns.norm(dim=0)).all()
    assert basis(columns[:, 2:3])[0].columns.shape == (50, 0)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e6])
def test_a_basis_of_independent_columns_is_orthonormal(spread):
    """At spread 1 the columns are far from dependent, at 1e6 all but dependent: two ways to the basis."""
    columns = torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = (columns[:, :1] * (spread - 1.0) + columns) * torch.logspace(-3, 3, 12, dtype=torch.float64)
    U, inside = basis(columns)
    found = U.times(torch.eye(12).double())
    assert (found.T @ found - torch.eye(12)).abs().max() < 1e-12
    assert relative_error(found @ inside, columns) < 1e-12


@pytest.mark.parametrize("method", IN_WEIGHTS)
def test_vectors_of_one_point_are_told_to_be_cast(method, made):
    with pytest.raises(DifferentPointError, match=r"a vector of scope 'layer' .*vector\.cast\('weight'\)"):
        linlora.fuse(made([1.0]), method)
    with pytest.raises(ValueError, match="no vectors were given"):
        METHODS[method]([])
