"""README: its Python runs, its commands exist, and it is short. The notebook of docs/ runs too."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linlora.testing import tiny_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
CHECKPOINT = "google-bert/bert-base-uncased"


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny BERT with a tokenizer, in a folder."""
    base = tiny_base("bert")
    base.save_pretrained(tmp_path / "bert")
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "joy": 2, "hours": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_the_example_runs_and_leaves_a_vector_and_an_adapter(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CHECKPOINT in EXAMPLE
    example = EXAMPLE.replace(CHECKPOINT, checkpoint.as_posix())
    exec(compile(example, "README.md", "exec"), {"__name__": "__readme__"})
    assert Path("films.safetensors").is_file()
    assert Path("films/adapter_config.json").is_file()


def test_the_notebook_runs_and_stock_peft_serves_what_it_exports(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = {"__name__": "__notebook__"}
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    assert encoder in code
    exec(compile(code.replace(encoder, checkpoint.as_posix()), "tutorial.ipynb", "exec"), names)
    assert names["best"] == max(names["curve"], key=names["curve"].get)
    assert (names["after"] - names["before"]).norm() > 1e-3
    torch.testing.assert_close(names["merged"], names["after"], atol=1e-4, rtol=1e-4)


def test_its_commands_are_jobs_of_the_makefile():
    jobs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(jobs)
    assert "make quickstart" in README
    assert "make test" in README


def test_it_is_read_in_five_minutes():
    assert len(README.split()) <= 900
