"""`linlora info`: what is built, and where it has run."""

import json

import pytest
from fake_gpu import entry
from typer.testing import CliRunner

from linlora import cli
from linlora.ops import evidence
from linlora.ops.cuda import library
from linlora.ops.evidence import Call


@pytest.fixture
def info(monkeypatch):
    def info(**status):
        monkeypatch.setattr(library, "status", lambda: {"built": False, "reason": "nvcc is not on the PATH", **status})
        result = CliRunner().invoke(cli.app, ["info"])
        assert result.exit_code == 0, result.output
        return result.output

    return info


def test_kernels_that_are_not_built_say_why_and_what_to_do(info, gpu):
    text = info()
    assert "CUDA kernels: not built: nvcc is not on the PATH; `make cuda` in a checkout" in text
    assert "not built; not yet run on a GPU" in text


def test_a_library_of_other_sources_is_said_to_be_stale(info):
    text = info(built=True, architectures=["80", "90a"], nvcc="13.0", bytes=3 * 2**20, sources="of long ago")
    assert "built for sm_80, sm_90a by nvcc 13.0, 3.0 MiB; csrc/ has changed since" in text


def test_the_table_names_the_gpus_that_have_run_a_kernel(info, gpu):
    gpu.table.write_text(json.dumps([entry(Call("lora_linear", (16, 16, 16), "bfloat16"), triton="wrong").as_json()]))
    rows = {line.split()[0]: line for line in info().splitlines() if "composed" in line}
    assert "NVIDIA H200" in rows["lora_linear"]
    assert "NVIDIA H200" not in rows["linearized_lora_linear"]
    assert rows["attention"].rstrip().endswith("–")


def test_a_gpu_says_how_many_calls_it_has_measured(info, gpu):
    assert "cuda:0 (NVIDIA H200): no call measured here; `linlora tune` does it" in info()
    evidence.add([entry(Call("lora_linear", (16, 16, 16), "bfloat16"), triton=1.2)])
    assert "cuda:0 (NVIDIA H200): 1 calls measured in" in info()
