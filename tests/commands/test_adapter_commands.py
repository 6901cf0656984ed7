"""linlora fuse, inspect, export and merge, as they are typed."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

import linlora
from linlora import TaskVector, formats
from linlora.cli import app
from linlora.commands.methods import FROM_FILES
from linlora.fusion.registry import FROM_VECTORS, METHODS
from linlora.storage.run_directory import open_run_directory
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def runner(line):
        result = CliRunner().invoke(app, line.split())
        return result.exit_code, " ".join(result.output.split())

    return runner


@pytest.fixture
def vectors(tmp_path):
    made = []
    for index in range(3):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model)
        randomize(model, 10 + index, ("lora_dA", "lora_dB"))
        made.append(TaskVector.from_model(model))
        made[-1].save(tmp_path / f"{index}.safetensors")
    linlora.export(model, tmp_path / "adapter")  # the last one
    tiny_base("bert").save_pretrained(tmp_path / "base")
    return made


def logits(model):
    return model(**tiny_batch("bert")).logits.detach()


def test_from_vectors_to_a_merged_model(run, vectors, tmp_path):
    """fuse, inspect, export, merge: each says what the next one is, and the numbers are those of the library."""
    status, output = run("fuse 0.safetensors 1.safetensors adapter --method ties --keep 0.3 --out fused.safetensors")
    assert status == 0
    assert "fused.safetensors: ties of 3 vectors of scope 'layer', 11 layers" in output
    assert "next: linlora inspect fused.safetensors" in output
    fused = linlora.fuse(vectors, "ties", keep=0.3)
    assert (TaskVector.load("fused.safetensors") - fused).norm() == 0.0

    status, output = run("inspect fused.safetensors")
    assert status == 0
    for words in ("task vector", "scope layer", fused.point_hash[:16], "3,072 in 11 layers, float32, all finite"):
        assert words in output
    assert "bert.encoder.layer.0.attention.output.dense 32 → 32 4 2 " in output

    status, output = run("export fused.safetensors --base base --out exported")
    assert status == 0
    assert "exported: 11 layers, rank 8; base model base" in output
    expected = logits(PeftModel.from_pretrained(tiny_base("bert"), "exported"))

    status, output = run("merge base fused.safetensors --out merged")
    assert status == 0
    assert "merged: 11 of 41 tensors folded" in output
    merged = BertForSequenceClassification.from_pretrained("merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ("--method average", {"method": "average"}),
        ("--scaling 0.5", {"scaling": 0.5}),
        ("--scaling=0.5,-1,2", {"scaling": [0.5, -1.0, 2.0]}),
        ("--method negation --scaling 0.25", {"method": "negation", "scaling": 0.25}),
        ("--method dare --drop 0.5 --seed 7", {"method": "dare", "drop": 0.5, "seed": 7}),
        ("--method dare --combine ties --keep 0.5", {"method": "dare", "combine": "ties", "keep": 0.5}),
    ],
)
def test_options_of_every_method(run, vectors, options, keywords):
    status, _ = run(f"fuse 0.safetensors 1.safetensors 2.safetensors --out f.safetensors {options}")
    assert status == 0
    assert (TaskVector.load("f.safetensors") - linlora.fuse(vectors, **keywords)).norm() == 0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fuse 0.safetensors --out f.safetensors --method ties --density 1", "ties takes no option"),
        ("fuse 0.safetensors --out base", "--out base: a task vector is written to a .safetensors file"),
        ("fuse 0.safetensors --out f.safetensors --method magic", "unknown method 'magic'; choose one of average"),
        ("fuse 0.safetensors --out f.safetensors --method lorahub", "lorahub needs examples of the tasks, which"),
        ("fuse 0.safetensors --out f.safetensors --scaling nan", "task_arithmetic: scaling has to be finite, got nan"),
        ("fuse 0.safetensors --out f.safetensors --scaling much", "scaling has to be finite, got much"),
        ("fuse 0.safetensors --out f.safetensors --method ties --keep all", "ties: keep has to be a finite number"),
        ("fuse 0.safetensors --out f.safetensors --scaling 1,2", "2 scalings for 1 vectors; pass one each, or one"),
        ("fuse 0.safetensors --out f.safetensors --method ties --keep", "option --keep has no value"),
        ("fuse 0.safetensors --out f.safetensors --scaling 1 1.safetensors", "unexpected '1.safetensors': vectors"),
        ("fuse 0.safetensors nothing.safetensors --out f.safetensors", "nothing.safetensors: no such file or folder"),
        ("fuse 0.safetensors other.safetensors --out f.safetensors", "0.safetensors and other.safetensors: the"),
        ("fuse scope.safetensors plain --out f.safetensors", "a network linearized as a whole (scope 'model')"),
        ("fuse plain --out f.safetensors --method ties", "ties: picks single values, and those of"),
        ("fuse plain --out f.safetensors --scope model", "--scope model: 'weight', or the scope of the vectors"),
        ("fuse 0.safetensors base --out f.safetensors", "base: a whole model, where an adapter is expected"),
        ("inspect cut.safetensors", "cut.safetensors: not a whole safetensors file"),
        ("inspect altered.safetensors", "does not match its checksum; the file was altered"),
        ("inspect base/config.json", "not an adapter; a .safetensors file or the folder of an adapter is expected"),
        ("export 0.safetensors --base llama --out f", "no weight for 11 of 11 adapted layers"),
        ("export scope.safetensors --out f", "has the function of a network linearized as a whole (scope 'model')"),
        ("merge llama 0.safetensors --out f", "no weight for 11 of 11 adapted layers"),
        ("merge base 0.safetensors --out base", "base exists already; choose another folder"),
        ("merge someone/model 0.safetensors --out f", "no such folder; a model of the Hugging Face hub has to be"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_writes_nothing(run, vectors, tmp_path, line, message):
    other = tiny_model("bert", trained=True, seed=4)
    other.save_pretrained("plain")
    linlora.linearize(other)
    TaskVector.from_model(other).save("other.safetensors")
    vectors[0].cast("model").save("scope.safetensors")
    tiny_base("llama").save_pretrained("llama")
    whole = (tmp_path / "0.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    (tmp_path / "altered.safetensors").write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    before = sorted(tmp_path.rglob("*"))
    status, output = run(line)
    assert status == 2
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["export 0.safetensors --out", "merge base 0.safetensors --out"])
@pytest.mark.parametrize("out", ["base", "adapter", "./base/", "file", "link", "hidden", "."])
def test_a_command_that_writes_a_folder_writes_over_none(run, vectors, tmp_path, line, out):
    """A base model's (which would load the adapter), an adapter's or a run's, a file, whatever a link names."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".kept").write_text("mine")
    (tmp_path / "link").symlink_to("base")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, output = run(f"{line} {out}")
    assert (status, output) == (2, f"error: {Path(out)} exists already; choose another folder, or remove it")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("line", ["export 0.safetensors --out empty", "merge base 0.safetensors --out empty"])
def test_an_empty_folder_is_written(run, vectors, tmp_path, line):
    (tmp_path / "empty").mkdir()
    status, output = run(line)
    assert status == 0, output


def test_plain_adapters_of_any_origin_are_fused_as_what_they_add_to_the_weights(run, vectors, tmp_path):
    tiny_model("bert", trained=True, seed=1, modules_to_save=["classifier"]).save_pretrained("a")
    tiny_model("bert", trained=True, seed=2, r=2, lora_alpha=7, target_modules=["query"]).save_pretrained("b")
    status, output = run("fuse a b 0.safetensors --out f.safetensors --scaling 0.5,-1,2")
    assert status == 0
    assert "task_arithmetic of 3 vectors of scope 'weight', 11 layers" in output
    assert "note: not fused, trained beside the adapters: classifier.bias, classifier.weight" in output
    a, b = formats.read("a"), formats.read("b")
    fused = TaskVector.load("f.safetensors")
    assert (fused - (0.5 * a - b + 2.0 * vectors[0].cast("weight"))).norm() < 1e-5 * fused.norm()
    status, output = run("inspect a")
    assert status == 0
    for words in (
        "PEFT LoRA adapter",
        "beside it classifier.bias, classifier.weight",
        "scope weight: what",
        "start none",
    ):
        assert words in output


def test_plain_adapters_of_one_start_are_fused_there_or_as_what_they_add_to_the_weights(run, tmp_path):
    model = tiny_model("bert", trained=True)
    start, trained = TaskVector.from_model(model), []
    for name in ("a", "b"):
        randomize(model, ord(name))
        trained.append(TaskVector.from_model(model, point=start))
        trained[-1].save(f"{name}.safetensors")
    status, output = run("fuse a.safetensors b.safetensors --out f.safetensors --method average")
    assert status == 0
    assert "the cross terms B_i A_j. What they add to the weights has none: --scope weight" in output
    status, output = run("fuse a.safetensors b.safetensors --out f.safetensors --method average --scope weight")
    assert status == 0
    expected = 0.5 * (trained[0].cast("weight") + trained[1].cast("weight"))
    assert (TaskVector.load("f.safetensors") - expected).norm() < 1e-6 * expected.norm()
    status, output = run("fuse a.safetensors a.safetensors --out f.safetensors")
    assert status == 0
    assert "scaling 0.3" in output
    assert "note: given more than once, and counted so: a.safetensors" in output


def test_vectors_of_two_points_are_refused_with_the_flag_that_fuses_them(run, tmp_path):
    for seed in (0, 1):
        model = tiny_model("bert", trained=True, seed=seed)
        linlora.linearize(model)
        TaskVector.from_model(model).save(f"{seed}.safetensors")
    status, output = run("fuse 0.safetensors 1.safetensors --out f.safetensors")
    assert status == 2
    assert "--scope weight" in output
    assert run("fuse 0.safetensors 1.safetensors --out f.safetensors --scope weight")[0] == 0


def test_plain_adapters_of_two_starts_are_fused_as_what_they_add_to_the_weights_with_a_note(run, tmp_path):
    for seed in (0, 1):
        model = tiny_model("bert", seed=seed)
        start = TaskVector.from_model(model)
        randomize(model, seed)
        TaskVector.from_model(model, point=start).save(f"{seed}.safetensors")
    status, output = run("fuse 0.safetensors 1.safetensors --out f.safetensors --method average")
    assert status == 0
    assert "note: not of one start: fused as what they add to the weights, exactly" in output
    a, b = (TaskVector.load(f"{seed}.safetensors").cast("weight") for seed in (0, 1))
    assert (TaskVector.load("f.safetensors") - 0.5 * (a + b)).norm() < 1e-6 * a.norm()


def test_adapters_that_name_their_base_differently_are_of_the_one_that_is_named(run, tmp_path):
    for name in "ab":
        tiny_model("bert", trained=True, seed=ord(name)).save_pretrained(name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": f"org/{name}"}))
    status, output = run("fuse a b --out f.safetensors")
    assert status == 2
    assert "a and b: the adapters are of different base models, 'org/a' and 'org/b'" in output
    assert "--scope weight" not in output  # they are there already
    assert "name them once: --base NAME" in output
    status, output = run("fuse a b --base org/base --method average --out f.safetensors")
    assert status == 0, output
    fused = TaskVector.load("f.safetensors")
    assert fused.base_model == "org/base"
    tiny_base("bert").save_pretrained("base")
    assert run("merge base a b --method average --out fused")[0] == 0
    assert run("merge base f.safetensors --out merged")[0] == 0
    found, expected = (BertForSequenceClassification.from_pretrained(name).eval() for name in ("fused", "merged"))
    torch.testing.assert_close(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("named", "own", "noted"),
    [
        ("org/other", None, True),
        ("elsewhere/other", "org/base-v2", True),
        ("org/base", None, False),
        ("./elsewhere/Base/", None, False),
        ("/cache/models--org--base/snapshots/0a1b", None, False),
        ("org/other", "org/other", False),
        ("link", None, False),
        (None, None, False),
    ],
)
@pytest.mark.parametrize("options", ["", " --method average"])
def test_a_merge_notes_an_adapter_that_names_another_base(run, tmp_path, named, own, noted, options):
    tiny_base("bert").save_pretrained("base")
    (tmp_path / "link").symlink_to("base")
    model = tiny_model("bert", trained=True)
    for name, base_model in (("a", named), ("b", "org/base")):
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(name)
    for path, key, value in (("a/adapter_config.json", "base_model_name_or_path", named),
                             ("base/config.json", "_name_or_path", own)):  # fmt: skip
        (tmp_path / path).write_text(json.dumps({**json.loads((tmp_path / path).read_text()), key: value}))
    status, output = run(f"merge base a b --out merged{options}")
    assert status == 0, output
    note = f"note: a was trained on '{named}' and is merged into 'base': right only if both are the same weights"
    assert (output.count("note:"), note in output) == ((1, True) if noted else (0, False)), output


@pytest.mark.parametrize(
    "command",
    [
        "inspect PLACE",
        "eval PLACE",
        "fuse PLACE --out f.safetensors",
        "export PLACE --out f",
        "merge base PLACE --out f",
    ],
)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("base", "base: a whole model, where an adapter is expected"),
        ("run", "the run in run is not finished; to continue: linlora train run/settings.yaml"),
        ("compare", "compare: the folder of a comparison or a quickstart (linlora compare); leave it out"),
        ("foreign", "foreign: no adapter in this folder"),
    ],
)
def test_every_command_says_what_a_folder_without_an_adapter_is(run, tmp_path, command, place, message):
    tiny_base("bert").save_pretrained("base")
    tiny_model("bert").save_pretrained("run/checkpoint-150")
    (tmp_path / "run" / "settings.yaml").write_text("name: it")
    open_run_directory(tmp_path / "compare", {"seeds": 1}, False, "linlora compare")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "settings.json").write_text('["of an editor"]')
    status, output = run(command.replace("PLACE", place))
    assert (status, output.startswith(f"error: {message}")) == (2, True), output


def test_help_lists_the_methods_there_are(run):
    for command in ("fuse", "merge"):
        assert all(method in run(f"{command} --help")[1] for method in FROM_VECTORS)
    assert set(re.findall(r"\w+", FROM_FILES)) & METHODS.keys() == set(FROM_VECTORS)


def test_inspect_of_a_vector_without_its_point(run, vectors):
    vectors[0].save("hash.safetensors", include_point=False)
    status, output = run("inspect hash.safetensors")
    assert status == 0
    assert "start not in the file, its hash alone" in output


@pytest.mark.parametrize(
    "out",
    ["0.safetensors", "./1.safetensors", "adapter/adapter_model.safetensors", "adapter/task_vector.safetensors"],
)
def test_a_fused_vector_takes_the_place_of_none_it_is_made_of(run, vectors, tmp_path, out):
    """Nor would it be read in the place of one, beside whose files it lies."""
    (tmp_path / "adapter" / "task_vector.safetensors").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    status, output = run(f"fuse 0.safetensors 1.safetensors adapter --out {out}")
    assert status == 2
    assert "is one of the vectors; name another file" in output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("line", "fused"),
    [
        ("a:0.6 b:-0.2", lambda a, b: 0.6 * a - 0.2 * b),
        ("a b:-0.2", lambda a, b: a - 0.2 * b),
        ("a b --method tsv", lambda a, b: linlora.fuse([a, b], "tsv")),
        ("a:0.6 b --method iso_c --set out_rank=2", lambda a, b: linlora.fuse([0.6 * a, b], "iso_c", out_rank=2)),
    ],
)
def test_a_merge_of_weighted_and_of_fused_adapters(run, line, fused):
    tiny_model("bert", trained=True).save_pretrained("a")
    other = tiny_model("bert", r=2, target_modules=["query"])
    randomize(other, 7)
    other.save_pretrained("b")
    tiny_base("bert").save_pretrained("base")
    status, output = run(f"merge base {line} --out merged")
    assert status == 0, output
    fused(formats.read("a"), formats.read("b")).save("f.safetensors")
    linlora.merging.merge_files("base", ["f.safetensors"], "expected")
    found, expected = (BertForSequenceClassification.from_pretrained(name).eval() for name in ("merged", "expected"))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge base a:nan --out f", "a:nan: the weight has to be finite"),
        ("merge base a:much --out f", "a:much: no such file or folder"),
        ("merge base a --method adamerging --out f", "adamerging needs inputs of the tasks, which adapters do not"),
        ("merge base a --set keep=1 --out f", "--set is an option of a method; name it with --method"),
        ("merge base a --method tsv --set keep=1 --out f", "tsv takes no option 'keep'; its options are scaling,"),
        ("merge base a --method dare --out f", "dare: picks single values"),
    ],
)
def test_a_merge_that_cannot_be_done(run, tmp_path, line, message):
    tiny_model("bert", trained=True).save_pretrained("a")
    tiny_base("bert").save_pretrained("base")
    status, output = run(line)
    assert status == 2
    assert message in output
    assert not (tmp_path / "f").exists()


def test_fuse_says_where_a_rank_is_more_than_there_is(run):
    tiny_model("bert", trained=True).save_pretrained("a")
    status, output = run("fuse a a --out-rank 64 --out f.safetensors")
    assert status == 0
    assert "rank 4, exact: --out-rank 64 is more than there is" in output


def test_fuse_says_what_a_cut_costs(run):
    tiny_model("bert", trained=True).save_pretrained("a")
    status, output = run("fuse a a --method tsv --out-rank 2 --out f.safetensors")
    assert status == 0
    error = TaskVector.load("f.safetensors").truncation_error
    assert f"rank 2; cut off: {error:.2%} of the norm" in output
    status, output = run("fuse a a --method average --out-rank 9 --out f.safetensors")
    assert "rank 4, exact" in output
