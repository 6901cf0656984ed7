"""Task vectors: algebra, files, points, and putting them into a model."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import linlora
from linlora import TaskVector
from linlora.storage.tensor_files import TensorFile
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model

finite = st.floats(-3, 3)


def linearized(trained=False, seed=5, **options):
    """A linearized model whose deltas are random."""
    model = tiny_model("bert", trained, **options)
    linlora.linearize(model)
    randomize(model, seed, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def vectors(trained=True, count=3):
    return [TaskVector.from_model(linearized(trained, seed)) for seed in range(10, 10 + count)]


def flat(vector):
    return torch.cat([vector.deltas[name].flatten().double() for name in sorted(vector.deltas)])


@given(a=finite, b=finite)
@settings(max_examples=25, deadline=None)
def test_vectors_form_a_vector_space(a, b):
    u, v, w = VECTORS
    torch.testing.assert_close(flat(a * u + b * v - w), a * flat(u) + b * flat(v) - flat(w), rtol=1e-5, atol=1e-5)
    assert (u * a).dot(v) == pytest.approx(a * float(flat(u) @ flat(v)), rel=1e-5, abs=1e-6)
    assert (u - u).norm() == 0.0
    assert u.norm() == pytest.approx(float(flat(u).norm()))
    assert u.cosine(2.0 * u) == pytest.approx(1.0)
    assert u.cosine(-u) == pytest.approx(-1.0)
    assert u.cosine(0.0 * u) == 0.0
    torch.testing.assert_close(flat(sum([u, v, w])), flat(u) + flat(v) + flat(w))
    torch.testing.assert_close(flat(u / 2.0), flat(u) / 2.0)


VECTORS = vectors()


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("include_point", [False, True], ids=["hash", "point"])
def test_saved_vectors_come_back_bit_for_bit_in_another_process(tmp_path, trained, include_point):
    model = linearized(trained)
    expected = model(**tiny_batch("bert")).logits
    vector = TaskVector.from_model(model)
    vector.save(tmp_path / "vector.safetensors", include_point=include_point)
    loaded = TaskVector.load(tmp_path / "vector.safetensors")
    assert torch.equal(flat(loaded), flat(vector))
    assert (loaded.scope, loaded.scalings, loaded.point_hash) == (vector.scope, vector.scalings, vector.point_hash)
    assert (loaded.point is None) != include_point
    fresh = tiny_model("bert", trained)
    linlora.linearize(fresh)
    linlora.apply(fresh, loaded)
    torch.testing.assert_close(fresh(**tiny_batch("bert")).logits, expected, rtol=0, atol=0)


def test_short_vectors_hold_no_dA():
    assert {name.rsplit(".", 1)[1] for name in TaskVector.from_model(linearized(False)).deltas} == {"dB"}
    assert {name.rsplit(".", 1)[1] for name in VECTORS[0].deltas} == {"dA", "dB"}


def test_a_model_can_be_linearized_at_the_point_of_a_vector():
    vector = TaskVector.from_model(linearized(trained=True))
    other = tiny_model("bert", seed=0)
    randomize(other, 99)  # an adapter with nothing in common
    linlora.linearize(other, point=vector)
    linlora.apply(other, vector)
    torch.testing.assert_close(
        other(**tiny_batch("bert")).logits, linearized(trained=True)(**tiny_batch("bert")).logits
    )


def test_apply_is_affine_in_the_vector_for_one_layer():
    """Layer scope: each layer is affine in its vector (the network of several layers is not)."""
    model = linearized(trained=True).double()
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    x = torch.randn(3, 32, dtype=torch.float64)
    u, v, _ = VECTORS
    outputs = []
    for vector in (0.0 * u, u, v, 0.3 * u + 1.7 * v):
        linlora.apply(model, vector)
        outputs.append(layer(x))
    zero, at_u, at_v, mixed = outputs
    torch.testing.assert_close(mixed - zero, 0.3 * (at_u - zero) + 1.7 * (at_v - zero), rtol=1e-5, atol=1e-6)


def test_plain_lora_vectors_need_their_start_and_apply_by_factors():
    model = tiny_model("bert")
    start = TaskVector.from_model(model)
    assert start.scope == "lora"
    assert start.norm() == 0.0
    randomize(model, 3)
    trained = TaskVector.from_model(model, point=start)
    expected = model(**tiny_batch("bert")).logits
    other = tiny_model("bert")
    linlora.apply(other, trained)
    torch.testing.assert_close(other(**tiny_batch("bert")).logits, expected, rtol=1e-4, atol=1e-5)
    linlora.apply(other, 0.0 * trained)
    assert TaskVector.from_model(other, point=start).norm() == 0.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings': it is a .*Embedding"),
        ({"use_dora": True}, "query': .*DoRA"),
        ({"lora_bias": True}, "query': .*lora_bias=True"),
    ],
    ids=["embedding", "dora", "lora_bias"],
)
def test_an_adapter_that_is_more_than_A_and_B_has_no_vector_and_is_exported_whole(options, reason, tmp_path):
    model, batch = tiny_model("bert", **options), tiny_batch("bert")
    with pytest.raises(ValueError, match=rf"has no task vector, which would lose .*{reason}"):
        TaskVector.from_model(model)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_" in name)
    linlora.export(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(stock(**batch)[0], model(**batch)[0])


def test_a_vector_from_zero_needs_no_point_in_its_file_and_sets_the_factors(tmp_path):
    """A plain adapter of unknown origin, as files held it before there was weight space: dA, dB are its A and B."""
    model = tiny_model("bert", trained=True)
    start = TaskVector.from_model(model)
    zero = replace(start, point={}, point_hash=hashlib.sha256().hexdigest())
    zero = TaskVector.from_model(model, point=zero)
    for combine in (lambda: -zero, lambda: zero + zero, zero.norm, lambda: linlora.fuse([zero])):
        with pytest.raises(linlora.DifferentPointError, match=r"the same for \(-A, -B\)"):
            combine()
    zero.save(tmp_path / "v.safetensors")
    loaded = TaskVector.load(tmp_path / "v.safetensors")
    assert (loaded.scope, loaded.point) == ("weight", {})
    other = tiny_model("bert")
    linlora.apply(other, loaded)
    torch.testing.assert_close(other(**tiny_batch("bert")).logits, model(**tiny_batch("bert")).logits)
    with pytest.raises(ValueError, match=r"starts from zero weights.*read with the adapter its training started from"):
        loaded.cast("layer")


CHANGES = {
    "apply ΔW": lambda model, vector: linlora.apply(model, 2.0 * vector.cast("weight")),
    "apply": linlora.apply,
    "move_point": lambda model, vector: vector.move_point(model),
}


@pytest.mark.parametrize("prepare", [lambda model: None, linlora.accelerate], ids=["PEFT", "accelerated"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_merged_adapter_is_not_changed(change, prepare):
    model = tiny_model("bert", trained=True)
    prepare(model)
    vector, before = TaskVector.from_model(model), dict(tiny_model("bert", trained=True).named_parameters())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged; call model.unmerge_adapter"):
        change(model, vector)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name])


@pytest.mark.parametrize("odd", [torch.ones(1, 1), torch.full((4, 32), torch.nan)], ids=["shape", "NaN"])
def test_a_point_that_does_not_fit_leaves_the_model_as_it_was(odd):
    model = tiny_model("bert", trained=True)
    vector = TaskVector.from_model(model)
    point = {name: 2.0 * tensor for name, tensor in vector.point.items()} | {"bert.pooler.dense.A0": odd}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.A0"):
        replace(vector, point=point).move_point(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


class TestRefusals:
    def test_different_points(self):
        u = VECTORS[0]
        other = tiny_model("bert", trained=True, seed=4)
        linlora.linearize(other)
        v = TaskVector.from_model(other)
        for combine in (lambda: u + v, lambda: u - v, lambda: u.dot(v), lambda: linlora.fuse([u, v])):
            with pytest.raises(linlora.DifferentPointError, match=r"different linearization points.*differ in .*A0"):
                combine()
        with pytest.raises(linlora.DifferentPointError, match="linearize\\(model, point=first_vector\\)"):
            linlora.apply(other, u)

    def test_different_scopes(self):
        lora = TaskVector.from_model(tiny_model("bert"))
        with pytest.raises(linlora.DifferentPointError, match="scope 'layer' and one of scope 'lora'"):
            VECTORS[0] + lora

    def test_different_layers(self):
        model = linearized(trained=True, target_modules=["query"])
        with pytest.raises(linlora.DifferentPointError, match="cover different layers; only one of them has bert"):
            VECTORS[0] + TaskVector.from_model(model)
        with pytest.raises(linlora.DifferentPointError, match="adapter 'default' differ in layers"):
            linlora.apply(model, VECTORS[0])

    def test_different_rank(self):
        model = tiny_model("bert", r=2)
        with pytest.raises(ValueError, match=r"A0' is \(4, 32\) in the vector and \(2, 32\) in the model: their ranks"):
            linlora.linearize(model, point=VECTORS[0])

    def test_different_scalings(self):
        other = linearized(trained=True, lora_alpha=32)
        v = TaskVector.from_model(other)
        assert v.point_hash == VECTORS[0].point_hash
        for combine in (lambda: v + VECTORS[0], lambda: linlora.fuse([v, VECTORS[0]]), lambda: VECTORS[0].cosine(v)):
            with pytest.raises(linlora.DifferentPointError, match=r"scaling of layer '.*' is .*one lora_alpha"):
                combine()
        with pytest.raises(linlora.DifferentPointError, match="is 2 in one of the vectors and 8 in the other"):
            linlora.apply(other, VECTORS[0])

    def test_equal_names_with_different_shapes(self):
        name = next(iter(VECTORS[0].deltas))
        cut = {**VECTORS[1].deltas, name: VECTORS[1].deltas[name][:2]}
        with pytest.raises(
            linlora.DifferentPointError, match=rf"rank or layer size: \(4, 32\) and \(2, 32\) in {name}"
        ):
            VECTORS[0] + replace(VECTORS[1], deltas=cut)

    def test_vector_without_its_point(self, tmp_path):
        VECTORS[0].save(tmp_path / "v.safetensors", include_point=False)
        with pytest.raises(ValueError, match="without its point"):
            linlora.linearize(tiny_model("bert"), point=TaskVector.load(tmp_path / "v.safetensors"))

    def test_several_active_adapters_have_to_be_named(self):
        model = tiny_model("bert")
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"adapters \['default', 'second'\] are active; name one"):
            TaskVector.from_model(model)
        with pytest.raises(ValueError, match=r"no adapter 'third'; the model has \['default', 'second'\]"):
            TaskVector.from_model(model, "third")

    def test_nan_in_a_vector_leaves_the_model_unchanged(self):
        model = linearized(trained=True)
        before = TaskVector.from_model(model)
        with pytest.raises(ValueError, match=r"NaN or infinity in 'bert.*dA'; the model is unchanged"):
            linlora.apply(model, float("nan") * before)
        assert torch.equal(flat(TaskVector.from_model(model)), flat(before))


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        VECTORS[0].save(tmp_path / "v.safetensors")
        return tmp_path / "v.safetensors"

    def altered(self, path, tensors=None, without=(), **metadata):
        with safe_open(path, "pt") as file:
            old = {key: value for key, value in file.metadata().items() if key not in without}
        save_file({**load_file(path), **(tensors or {})}, path, {**old, **metadata})

    def of_version_1(self, path, tensors=None, without=(), **metadata):
        """A file as it was written before headers had a checksum."""
        self.altered(path, tensors, ("header_checksum", *without), **{"format_version": "1", **metadata})

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
            TaskVector.load(tmp_path / "nothing.safetensors")

    def test_truncated(self, path):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(linlora.CorruptFileError, match=r"v\.safetensors: not a whole safetensors file.*truncated"):
            TaskVector.load(path)

    def test_foreign(self, path):
        save_file({"weight": torch.ones(2)}, path)
        with pytest.raises(linlora.CorruptFileError, match="not a task vector"):
            TaskVector.load(path)

    def test_newer_format(self, path):
        self.of_version_1(path, format_version="9")
        with pytest.raises(linlora.CorruptFileError, match="format version 9, this linlora reads 1, 2; update"):
            TaskVector.load(path)

    def test_nan_is_refused_by_the_name_of_the_tensor(self, path):
        name = next(iter(VECTORS[0].deltas))
        self.of_version_1(path, {name: torch.full_like(VECTORS[0].deltas[name], float("nan"))}, ("checksums",))
        with pytest.raises(linlora.CorruptFileError, match=f"tensor '{name}' holds NaN"):
            TaskVector.load(path)

    @pytest.mark.parametrize("part", ["deltas", "point"])
    def test_an_altered_value_is_found_by_the_name_of_its_tensor(self, path, part):
        values = getattr(VECTORS[0], part)
        name = list(values)[-1]
        changed = values[name].clone()
        changed[0, 0] += 1e-3
        self.altered(path, {name: changed})
        with pytest.raises(
            linlora.CorruptFileError, match=f"tensor '{name}' does not match its checksum; the file was"
        ):
            TaskVector.load(path)

    def test_an_altered_point_in_a_file_without_checksums(self, path):
        name = next(iter(VECTORS[0].point))
        self.of_version_1(path, {name: VECTORS[0].point[name] + 1.0}, ("checksums",))
        with pytest.raises(linlora.CorruptFileError, match="does not match its hash"):
            TaskVector.load(path)

    def test_metadata_that_lacks_something(self, path):
        save_file(load_file(path), path, {"format": "linlora.task_vector", "format_version": "1", "scope": "layer"})
        with pytest.raises(linlora.CorruptFileError, match="its metadata has no point_hash, scalings, base_model"):
            TaskVector.load(path)

    @pytest.mark.parametrize(
        "altered", [{"scalings": "{"}, {"scalings": "[1]"}, {"scalings": '{"x": 1.0}'}, {"scope": "network"}]
    )
    def test_metadata_that_does_not_fit(self, path, altered):
        self.of_version_1(path, **altered)
        with pytest.raises(linlora.CorruptFileError, match=r"its metadata does not fit its tensors|its scalings: "):
            TaskVector.load(path)

    def test_files_of_version_1_are_read(self, path):
        self.of_version_1(path)
        assert torch.equal(flat(TaskVector.load(path)), flat(VECTORS[0]))

    @pytest.mark.parametrize("key", ["format_version", "scope", "point_hash", "scalings", "base_model", "checksums"])
    def test_altered_metadata(self, path, key):
        with safe_open(path, "pt") as file:
            value = file.metadata()[key]
        self.altered(path, **{key: value.replace("2", "1") if "2" in value else value + "1"})
        with pytest.raises(linlora.CorruptFileError, match="its header does not match its checksum"):
            TaskVector.load(path)
        self.altered(path, without=("header_checksum",), format_version="2")
        with pytest.raises(linlora.CorruptFileError, match="its metadata has no checksum"):
            TaskVector.load(path)

    @pytest.mark.parametrize("scaling", ["NaN", "Infinity", "1e300", "true", '"2.0"', "null"])
    def test_a_scaling_that_cannot_be_meant_is_neither_read_nor_saved(self, path, scaling):
        layers = VECTORS[0].scalings
        self.of_version_1(path, scalings="{" + ", ".join(f'"{layer}": {scaling}' for layer in layers) + "}")
        with pytest.raises(linlora.CorruptFileError, match=r"v\.safetensors: layer .* has the LoRA scaling"):
            TaskVector.load(path)
        value = json.loads(scaling)
        with pytest.raises(ValueError, match="has the LoRA scaling"):
            replace(VECTORS[0], scalings=dict.fromkeys(layers, value)).save(path)

    @pytest.mark.parametrize("change", ["of integers", "of another rank", "without its layer"])
    def test_tensors_that_are_no_factors(self, path, change):
        name = next(iter(VECTORS[0].deltas))
        wrong = {
            "of integers": {name: VECTORS[0].deltas[name].int()},
            "of another rank": {name: torch.ones(3, 3)},
            "without its layer": {"x.A0": torch.ones(2, 2)},
        }
        self.of_version_1(path, wrong[change], ("checksums",))
        with pytest.raises(linlora.CorruptFileError, match=r"factors? (of|are) "):
            TaskVector.load(path)

    def test_checksums_of_another_program_are_none(self, path):
        save_file(load_file(path), path, {"checksums": "sha256 of something"})
        assert not TensorFile(path).has_tensor_checksums

    def test_a_vector_left_in_its_file_reads_what_was_there_when_it_was_opened(self, path):
        stored = TaskVector.open(path)
        VECTORS[1].save(path)
        assert torch.equal(flat(stored), flat(VECTORS[0]))
        assert torch.equal(flat(stored.loaded()), flat(VECTORS[0]))

    def test_a_file_cut_short_while_it_is_open(self, path):
        stored = TaskVector.open(path)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(linlora.CorruptFileError, match="is cut short; the file was truncated meanwhile"):
            stored.loaded()

    def test_a_killed_save_leaves_the_previous_file_whole(self, path, monkeypatch):
        before = path.read_bytes()

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("linlora.storage.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            VECTORS[1].save(path)
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == ["v.safetensors"]

    def test_metadata_is_plain_json(self, path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "linlora.task_vector"
        assert json.loads(metadata["scalings"])["bert.encoder.layer.0.attention.self.query"] == 2.0
