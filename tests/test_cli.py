"""The command line: what it prints, and one-line errors instead of tracebacks."""

import io
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import linlora
from linlora import cli


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_info_shows_versions_and_the_backend_of_every_op(run):
    result = run("info")
    assert result.exit_code == 0
    assert f"linlora {linlora.__version__}" in result.output
    for word in ("torch", "triton", "peft", "factor_gradients", "linearized_lora_linear"):
        assert word in result.output


def test_a_locale_without_the_letters_of_a_formula_ends_no_run(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "argv", ["linlora", "info"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed.seek(0)
    assert "?" in printed.read()  # for the dash of an op that has not run


def test_quickstart_passes_its_options_on(run, monkeypatch, tmp_path):
    from linlora import quickstart

    seen = {}
    monkeypatch.setattr(quickstart, "run", lambda out, **options: seen.update(out=out, **options))
    assert run("quickstart", "--out", str(tmp_path), "--seeds", "2", "--fresh").exit_code == 0
    assert seen == {"out": tmp_path, "device": "cpu", "seeds": 2, "fresh": True, "workers": 2}


def test_errors_of_a_user_are_one_line(run, monkeypatch):
    from linlora import quickstart

    def refuse(*_, **__):
        raise ValueError("directory holds another run")

    monkeypatch.setattr(quickstart, "run", refuse)
    result = run("quickstart")
    assert result.exit_code == 2
    assert "error: directory holds another run" in result.output
    assert "Traceback" not in result.output


def test_the_version_is_printed_alone(run):
    assert run("--version").output == f"linlora {linlora.__version__}\n"


def test_help_names_types_in_plain_words(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("train", "--help").output
    assert "list[" not in text
    assert "<str>" not in text
    for choice in ("lora", "lora-fa", "layer", "model", "trained", "frozen", "prototypes"):
        assert f'"{choice}"' in text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train"], ["eval", "gone"], ["fuse", "gone", "--out", "f.safetensors"]]
)
def test_help_and_what_is_typed_wrong_import_no_torch(arguments):
    code = (
        f"import sys; sys.argv[1:] = {arguments}; from linlora import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_fusing_files_imports_no_peft_and_no_transformers(tmp_path):
    """They take most of the time that the fusion of small adapters takes."""
    for seed in "ab":
        linlora.testing.tiny_model("bert", trained=True).save_pretrained(tmp_path / seed)
    arguments = [
        "fuse",
        *(str(tmp_path / seed) for seed in "ab"),
        "--method",
        "tsv",
        "--out",
        str(tmp_path / "f.safetensors"),
    ]
    code = (
        f"import sys; sys.argv[1:] = {arguments}; from linlora import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
        "sys.exit(','.join({'peft', 'transformers', 'torch.distributed.tensor'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert linlora.TaskVector.load(tmp_path / "f.safetensors").scope == "weight"
