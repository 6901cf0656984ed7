"""Vectors in weight space: their algebra is that of dense ΔW, in float64."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import linlora
from linlora import DifferentPointError, TaskVector, WeightVector, formats
from linlora.layers import weights
from linlora.merging import merge_files
from linlora.testing import randomize, relative_error, tiny_base, tiny_batch, tiny_model
from linlora.vectors.points import point_hash

numbers = st.floats(-3, 3)
LAYERS = {"q": (5, 7), "k": (6, 4), "v": (3, 9)}
SUBSETS = [("q", "k", "v"), ("q",), ("k", "v"), ("v", "q")]


def made(seed, layers=LAYERS, dtype=torch.float32, base_model=None):
    """A vector of random ranks and scalings."""
    generator = torch.Generator().manual_seed(seed)
    deltas, scalings = {}, {}
    for layer in layers:
        outputs, inputs = LAYERS[layer]
        rank = int(torch.randint(1, 5, (), generator=generator))
        deltas[f"{layer}.dA"] = torch.randn(rank, inputs, generator=generator).to(dtype)
        deltas[f"{layer}.dB"] = torch.randn(outputs, rank, generator=generator).to(dtype)
        scalings[layer] = float(torch.rand((), generator=generator)) + 0.5
    return WeightVector(deltas, {}, point_hash({}), scalings, "weight", base_model)


def dense(vector):
    """All ΔW, one after the other, in float64; zeros for a layer that is absent."""
    parts = []
    for layer, shape in LAYERS.items():
        dW = torch.zeros(shape, dtype=torch.float64)
        if layer in vector.scalings:
            A, B = (vector.deltas[f"{layer}.{kind}"].double() for kind in ("dA", "dB"))
            dW = vector.scalings[layer] * B @ A
        parts.append(dW.flatten())
    return torch.cat(parts)


def logits(model, architecture="bert"):
    return model(**tiny_batch(architecture))[0].detach()


@given(a=numbers, b=numbers, layers=st.lists(st.sampled_from(SUBSETS), min_size=3, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_algebra_is_that_of_dense_matrices(a, b, layers, seed):
    u, v, w = (made(seed + index, names) for index, names in enumerate(layers))
    expected = a * dense(u) + b * dense(v) - dense(w)
    assert (dense(a * u + b * v - w) - expected).norm() <= 1e-6 * max(x.norm() for x in map(dense, (u, v, w))) * 9
    torch.testing.assert_close(dense(sum([u, v, w])), dense(u) + dense(v) + dense(w), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(-u / 2.0), -dense(u) / 2.0)
    assert u.dot(v) == pytest.approx(float(dense(u) @ dense(v)), rel=1e-5, abs=1e-5)
    assert u.norm() == pytest.approx(float(dense(u).norm()), rel=1e-6)
    assert u.cosine(3.0 * u) == pytest.approx(1.0)
    assert u.cosine(-u) == pytest.approx(-1.0)
    assert u.cosine(0.0 * u) == 0.0
    assert (u - u).norm() == 0.0
    assert u.loaded().norm() == u.norm()


EVERYTHING = {
    "norm": lambda u, v: u.norm(),
    "dot": lambda u, v: u.dot(v),
    "sum": lambda u, v: dense(u + v),
    "fused": lambda u, v: dense(linlora.fuse([u, v], scaling=[1.0, -0.5])),
    "tsv": lambda u, v: dense(linlora.fuse([u, v], "tsv", out_rank=2)),
    "knots_ties": lambda u, v: dense(linlora.fuse([u, v], "knots_ties")),
}


@pytest.mark.parametrize("action", EVERYTHING)
@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_adapters_in_float8_are_those_of_their_values(dtype, other, action):
    """PyTorch neither promotes nor adds float8; beside other dtypes either."""
    u, v = made(1, dtype=dtype), made(2, dtype=other)
    exact = [replace(w, deltas={name: delta.float() for name, delta in w.deltas.items()}) for w in (u, v)]
    found, expected = EVERYTHING[action](u, v), EVERYTHING[action](*exact)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def test_an_adapter_in_float8_is_read_exported_and_merged(tmp_path):
    model = tiny_model("bert", trained=True)
    tiny_base("bert").save_pretrained(tmp_path / "base")
    for dtype in (torch.float8_e4m3fn, torch.float32):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.float8_e4m3fn).to(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        vector = formats.read(tmp_path / str(dtype))
        assert {delta.dtype for delta in vector.deltas.values()} == {dtype}
        linlora.export(2.0 * vector, tmp_path / f"twice {dtype}")
        merge_files(tmp_path / "base", [tmp_path / f"twice {dtype}"], tmp_path / f"merged {dtype}")
    merged = {(folder / "model.safetensors").read_bytes() for folder in tmp_path.glob("merged *")}
    assert len(merged) == 1


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_the_norm_of_a_small_difference_keeps_its_digits(size):
    u = made(1, dtype=torch.float64)
    other = {name: delta + size * torch.randn_like(delta) for name, delta in u.deltas.items()}
    v = WeightVector(other, {}, u.point_hash, u.scalings, "weight")
    assert (v - u).norm() == pytest.approx(float((dense(v) - dense(u)).norm()), rel=1e-6)


def test_a_file_is_opened_in_its_space_whatever_was_imported_before(tmp_path):
    made(1).save(tmp_path / "vector")
    opening = f"from linlora import TaskVector; print(type(TaskVector.open({str(tmp_path / 'vector')!r})).__name__)"
    told = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "WeightVector"


def test_dtypes_do_not_depend_on_the_order():
    parts = [made(1, dtype=torch.bfloat16), made(2, dtype=torch.float64), made(3, dtype=torch.float16)]
    for method in ("average", "task_arithmetic", "negation"):
        one, other = linlora.fuse(parts, method), linlora.fuse(parts[::-1], method)
        assert one.deltas.keys() == other.deltas.keys()
        assert all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)
        assert {delta.dtype for delta in one.deltas.values()} == {torch.float64}
    halves = linlora.fuse([parts[0], parts[2]], "average")
    assert {delta.dtype for delta in halves.deltas.values()} == {torch.float32}


@pytest.mark.parametrize(("scalings", "dtype"), [((2.0, -2.0), torch.bfloat16), ((2.0, 0.3), torch.float32)])
def test_a_sum_keeps_the_dtype_in_which_it_is_exact(scalings, dtype):
    """Where λ s is one number, up to its sign, it is the scaling of the sum, and no factor is rounded."""
    vectors = [made(1, dtype=torch.bfloat16), made(2, dtype=torch.bfloat16)]
    vectors = [replace(v, scalings=dict.fromkeys(LAYERS, s)) for v, s in zip(vectors, scalings, strict=True)]
    fused = linlora.fuse(vectors, "average")
    assert {delta.dtype for delta in fused.deltas.values()} == {dtype}
    expected = sum(map(dense, vectors)) / 2
    assert relative_error(dense(fused), expected) < (1e-15 if dtype == torch.bfloat16 else 1e-7)
    assert relative_error(dense(linlora.fuse(vectors, scaling=[0.0, 0.0])), 0.0 * expected) == 0.0


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "files"])
def test_linear_methods_are_those_of_dense_matrices(stored, tmp_path):
    vectors = [made(seed, names, dtype) for seed, names, dtype in zip(
        range(4), SUBSETS, (torch.float32, torch.bfloat16, torch.float16, torch.float32), strict=True
    )]  # fmt: skip
    matrices = [dense(vector) for vector in vectors]
    if stored:
        for index, vector in enumerate(vectors):
            vector.save(tmp_path / str(index))
        vectors = [TaskVector.open(tmp_path / str(index)) for index in range(4)]
    weights = [0.5, -1.0, 2.0, 0.0]
    expected = {
        "average": ({}, sum(matrices) / 4),
        "task_arithmetic": ({"scaling": weights}, sum(w * m for w, m in zip(weights, matrices, strict=True))),
        "negation": ({"scaling": 0.7}, -0.7 * sum(matrices)),
    }
    for method, (options, matrix) in expected.items():
        fused = linlora.fuse(vectors, method, **options)
        fused.save(tmp_path / method)
        for found in (fused, TaskVector.load(tmp_path / method), linlora.fuse(iter(vectors), method, **options)):
            assert relative_error(dense(found), matrix) < 1e-6
            assert (found.scope, found.point) == ("weight", {})


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "t5"])
def test_a_sum_of_adapters_of_any_origin_is_one_adapter_for_stock_peft(architecture, trained, tmp_path):
    """Other seeds, ranks, scalings and layers, and a linearized one: the logits of W + Σ λ ΔW."""
    plain = tiny_model(architecture, r=2, use_rslora=True)
    randomize(plain, 7)
    linearized = tiny_model(architecture, trained, lora_alpha=3)
    linlora.linearize(linearized)
    randomize(linearized, 3, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    plain.save_pretrained(tmp_path / "plain")
    vectors = [formats.read(tmp_path / "plain"), TaskVector.from_model(linearized).cast("weight")]
    fused = linlora.fuse(vectors, scaling=[-0.7, 0.6])
    tiny_base(architecture).save_pretrained(tmp_path / "base")
    linlora.export(fused, tmp_path / "fused", base=tmp_path / "base")

    expected = tiny_base(architecture)
    weights = dict(expected.named_parameters())
    for model, scaling in ((plain, -0.7), (linearized, 0.6)):
        merged = dict(linlora.merge(model).named_parameters())
        for name, start in dict(tiny_base(architecture).named_parameters()).items():
            weights[name].data += scaling * (merged[name] - start)
    stock = PeftModel.from_pretrained(tiny_base(architecture), tmp_path / "fused")
    torch.testing.assert_close(logits(stock, architecture), logits(expected, architecture), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits(linlora.merge(stock), architecture), logits(expected, architecture), rtol=1e-4, atol=1e-5
    )
    fused.save(tmp_path / "fused.safetensors")
    merge_files(tmp_path / "base", [tmp_path / "fused.safetensors"], tmp_path / "merged")
    whole = type(expected).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole, architecture), logits(expected, architecture), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_vector_merges_into_a_model_in_memory(architecture, tmp_path):
    model = tiny_model(architecture, trained=True)
    linlora.linearize(model)
    randomize(model, 3, ("lora_dA", "lora_dB"))
    merged = linlora.merge(tiny_base(architecture), TaskVector.from_model(model))
    torch.testing.assert_close(logits(merged, architecture), logits(model, architecture), rtol=1e-4, atol=1e-5)
    back = linlora.merge(merged, -1.0 * TaskVector.from_model(model).cast("weight"))
    base = tiny_base(architecture)
    torch.testing.assert_close(logits(back, architecture), logits(base, architecture), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal]
)
def test_a_vector_does_not_merge_into_a_weight_that_is_computed(norm):
    base = tiny_base("bert")
    norm(base.bert.pooler.dense)
    vector = TaskVector.from_model(tiny_model("bert", trained=True)).cast("weight")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"'bert\.pooler\.dense' is computed from other parameters"):
        linlora.merge(base, vector)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_merge_that_stops_halfway_says_what_the_weights_are(monkeypatch):
    calls, fold = [], weights.fold

    def stops(weight, update):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError
        fold(weight, update)

    monkeypatch.setattr(weights, "fold", stops)
    vector = TaskVector.from_model(tiny_model("bert", trained=True)).cast("weight")
    with pytest.raises(RuntimeError, match=r"stopped at layer '.*'.* load the base model again"):
        linlora.merge(tiny_base("bert"), vector)


@pytest.mark.parametrize("prepare", [lambda model: None, linlora.accelerate], ids=["PEFT", "accelerated"])
def test_a_vector_goes_into_an_adapter_of_its_rank_or_more(prepare, tmp_path):
    source = tiny_model("bert", trained=True, r=3, lora_alpha=5, target_modules=["query"])
    source.save_pretrained(tmp_path)
    target = tiny_model("bert", trained=True, r=8)
    prepare(target)
    for scaling in (1.0, -2.0, 0.0):
        linlora.apply(target, scaling * formats.read(tmp_path))
        expected = tiny_model("bert", trained=True, r=3, lora_alpha=5 * scaling, target_modules=["query"])
        torch.testing.assert_close(logits(target), logits(expected), rtol=1e-4, atol=1e-6)


def test_a_plain_vector_from_a_start_is_cast_with_its_start():
    model = tiny_model("bert", trained=True)
    start = TaskVector.from_model(model)
    randomize(model, 4)
    vector = TaskVector.from_model(model, point=start)
    other = tiny_model("bert")
    linlora.apply(other, vector.cast("weight"))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)
    assert vector.scope == "lora"  # its own algebra, from its start
    assert relative_error(*((0.0 * vector).cast("weight").deltas[n] for n in start.point if False)) if False else True


def test_a_negative_multiple_is_exported_with_a_positive_alpha(tmp_path):
    linlora.export(-2.0 * made(1), tmp_path)
    config = formats.open(tmp_path).config
    assert min([config["lora_alpha"], *config["alpha_pattern"].values()]) > 0
    assert relative_error(dense(formats.read(tmp_path)), -2.0 * dense(made(1))) < 1e-6


class TestRefusals:
    def test_model_scope(self):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model, scope="model")
        with pytest.raises(ValueError, match=r"scope 'model'\) computes .*no change of its weights.*cast\('layer'\)"):
            TaskVector.from_model(model).cast("weight")

    def test_no_point(self, tmp_path):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model)
        TaskVector.from_model(model).save(tmp_path / "v", include_point=False)
        with pytest.raises(ValueError, match="saved without its point"):
            TaskVector.load(tmp_path / "v").cast("weight")

    def test_other_scopes(self):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model)
        vector = TaskVector.from_model(model)
        for combine in (lambda: vector + made(1), lambda: made(1) + vector, lambda: made(1).dot(vector)):
            with pytest.raises(DifferentPointError, match=r"do not add; what they add.*vector\.cast\('weight'\)"):
                combine()
        for mixed in ([vector, made(1)], [made(1), vector]):
            with pytest.raises(DifferentPointError, match=r"cast\('weight'\)"):
                linlora.fuse(mixed)

    def test_other_base_models(self):
        wide = WeightVector({"q.dA": torch.ones(1, 8), "q.dB": torch.ones(5, 1)}, {}, "", {"q": 1.0}, "weight")
        with pytest.raises(DifferentPointError, match=r"layer 'q' is 7 -> 5 in one .* 8 -> 5 in the other: they are"):
            made(1) + wide
        one, other = made(1, base_model="org/Base-7B"), made(2, base_model="org/Base-13B")
        with pytest.raises(DifferentPointError, match=r"'org/Base-7B' and 'org/Base-13B'\. If the two are the same"):
            linlora.fuse([made(3), one, other])
        cached = made(2, base_model="/cache/models--org--Base-7B/snapshots/0a1b2c")
        assert (one + cached).base_model == linlora.fuse([made(3), one, cached]).base_model == "org/Base-7B"

    @pytest.mark.parametrize("method", ["ties", "dare"])
    def test_methods_that_pick_single_values(self, method):
        with pytest.raises(ValueError, match=f"{method}: picks single values, .* full rank"):
            linlora.fuse([made(1), made(2)], method)

    def test_values_that_are_not_finite(self):
        with pytest.raises(ValueError, match=r"layer 'k' of vector 2 holds NaN"):
            linlora.fuse([made(1), float("nan") * made(2)])

    def test_a_model_that_cannot_hold_it(self):
        vector = weight_of(tiny_model("bert", trained=True, r=8))
        before = logits(small := tiny_model("bert", trained=True))
        with pytest.raises(ValueError, match=r"has rank 8 in the vector, and adapter 'default' has rank 4"):
            linlora.apply(small, vector)
        with pytest.raises(ValueError, match="NaN or infinity"):
            linlora.apply(small, float("nan") * weight_of(small))
        with pytest.raises(DifferentPointError, match=r"changes layer '.*', which adapter 'default' does not"):
            linlora.apply(tiny_model("bert", target_modules=["key"]), vector)
        with pytest.raises(DifferentPointError, match="not the base model the vector is of"):
            linlora.apply(tiny_model("bert", target_modules=["query"]), weight_of_query(3, 5))
        assert torch.equal(logits(small), before)
        linlora.linearize(small)
        with pytest.raises(DifferentPointError, match=r"is linearized, .*delinearize\(model\)"):
            linlora.apply(small, vector)

    def test_a_plain_model_it_does_not_fit(self):
        base, vector = tiny_base("bert"), weight_of(tiny_model("bert", trained=True))
        before = {name: value.clone() for name, value in base.state_dict().items()}
        layer = list(vector.scalings)[-1]
        wrong = {n: d for n, d in vector.deltas.items() if not n.startswith(layer)}
        bad = WeightVector(
            {**wrong, f"{layer}.dA": torch.full((1, 32), float("inf")), f"{layer}.dB": torch.ones(32, 1)},
            {}, vector.point_hash, vector.scalings, "weight",
        )  # fmt: skip
        for other, message in (
            (bad, "holds NaN or infinity; the model is unchanged"),
            (made(1), "the vector is of a layer 'q', and the model has no such layer"),
            (weight_of_query(3, 5), "not the base model the vector is of"),
        ):
            with pytest.raises(ValueError, match=message):
                linlora.merge(base, other)
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        with pytest.raises(TypeError, match=r"into an adapter goes linlora\.apply"):
            linlora.merge(tiny_model("bert"), vector)
        with pytest.raises(ValueError, match=r"is not finite in torch\.float16; .* the model is unchanged"):
            linlora.merge(base.half(), 1e5 * vector)

    def test_no_tangent_space(self):
        with pytest.raises(ValueError, match="no linearization point"):
            linlora.linearize(tiny_model("bert"), point=weight_of(tiny_model("bert")))
        with pytest.raises(ValueError, match=r"no point to linearize at.*formats\.read\(folder, point=start\)"):
            made(1).cast("layer")
        with pytest.raises(ValueError, match="is no point; pass"):
            TaskVector.from_model(tiny_model("bert"), point=made(1))

    def test_an_adapter_of_changed_base_weights(self, tmp_path):
        tiny_model("bert", init_lora_weights="pissa").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="init_lora_weights 'pissa' changes the base weights"):
            formats.read(tmp_path)

    def test_a_file_whose_factors_do_not_pair(self, tmp_path):
        vector = made(1, ("q",))
        deltas = {"q.dA": vector.deltas["q.dA"], "q.dB": torch.ones(5, 9)}
        WeightVector(deltas, {}, vector.point_hash, vector.scalings, "weight").save(tmp_path / "v")
        with pytest.raises(linlora.CorruptFileError, match="does not fit the other factors of its layer"):
            TaskVector.open(tmp_path / "v")


def weight_of(model):
    return TaskVector.from_model(model).cast("weight")


def weight_of_query(outputs, inputs):
    layer = "bert.encoder.layer.0.attention.self.query"
    deltas = {f"{layer}.dA": torch.ones(1, inputs), f"{layer}.dB": torch.ones(outputs, 1)}
    return WeightVector(deltas, {}, point_hash({}), {layer: 1.0}, "weight")
