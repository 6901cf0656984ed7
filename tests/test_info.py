"""`linlora info`: what is built, and where it has run."""

import json

import pytest
from typer.testing import CliRunner

from linlora import cli
from linlora.ops import evidence
from linlora.ops.cuda import library


@pytest.fixture
def info(monkeypatch):
    def info(**status):
        monkeypatch.setattr(library, "status", lambda: {"built": False, "reason": "nvcc is not on the PATH", **status})
        result = CliRunner().invoke(cli.app, ["info"])
        assert result.exit_code == 0, result.output
        return result.output

    yield info
    evidence.entries.cache_clear()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of evidence in place of the one that is installed."""

    def table(*entries):
        monkeypatch.setattr(evidence, "TABLE", tmp_path / "evidence.json")
        evidence.TABLE.write_text(json.dumps(entries))
        evidence.entries.cache_clear()

    return table


def test_kernels_that_are_not_built_say_why_and_what_to_do(info, table):
    table()
    text = info()
    assert "CUDA kernels: not built: nvcc is not on the PATH; `make cuda` in a checkout" in text
    assert "not built; not yet run on a GPU" in text


def test_a_library_of_other_sources_is_said_to_be_stale(info):
    text = info(built=True, architectures=["80", "90a"], nvcc="13.0", bytes=3 * 2**20, sources="of long ago")
    assert "built for sm_80, sm_90a by nvcc 13.0, 3.0 MiB; csrc/ has changed since" in text


def test_the_table_names_the_gpus_that_have_executed_a_kernel(info, table):
    table(
        {
            "op": "lora_linear", "backend": "triton", "shape": "large", "dtype": "bfloat16", "dropout": False,
            "correct": False, "speedup_over_torch": 0.0, "max_rank": 16, "cases": 1, "architecture": "sm_90",
            "gpu": "NVIDIA H200", "date": "2026", "commit": "abc", "file": "bench/results/h200/run.json",
        }
    )  # fmt: skip
    rows = {line.split()[0]: line for line in info().splitlines() if "composed" in line}
    assert "NVIDIA H200" in rows["lora_linear"]
    assert "NVIDIA H200" not in rows["linearized_lora_linear"]
    assert rows["attention"].rstrip().endswith("–")
