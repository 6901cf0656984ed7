"""csrc/ compiles for every architecture, and what comes out registers, loads and is what the kernels promise."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import OBJECTS, csrc, kernels


def test_every_kernel_is_compiled_for_its_architectures_and_none_spills(built):
    reports = csrc.reports(OBJECTS)
    assert csrc.problems(OBJECTS) == []
    architectures = {
        name: {report.architecture for report in reports if f"{name}_kernel" in report.kernel}
        for name in ("lora_linear_sm80", "lora_linear_sm90")
    }
    assert architectures == {"lora_linear_sm80": {"80", "90a", "100"}, "lora_linear_sm90": {"90a"}}
    assert all(report.registers > 0 for report in reports)


@pytest.mark.parametrize(
    ("kernel", "architecture", "instructions"),
    [
        ("lora_linear_sm90", "90a", ("HGMMA", "UTMALDG", "SYNCS")),  # wgmma, TMA loads, mbarriers
        ("lora_linear_sm80", "80", ("HMMA", "LDSM", "LDGSTS")),  # mma.sync, ldmatrix, cp.async
    ],
)
def test_the_machine_code_holds_the_instructions_the_design_is_about(built, kernel, architecture, instructions):
    for compiled in kernels(kernel, architecture):
        names = {name for text in compiled.code.values() for name in re.findall(r"\b[A-Z0-9]+\b", text)}
        assert names >= set(instructions), compiled.name


@pytest.fixture(scope="session")
def operators(built):
    """What a fresh interpreter that loads the library says of the operator, Triton's and this one."""
    program = f"""
import json, torch
from pathlib import Path
import linlora.kernels.library
from linlora.kernels.packing import pack
from linlora.kernels.problem import LoraLinear
from linlora.ops.cuda import library
library._LIBRARY, library.status = Path({str(built / csrc.LIBRARY)!r}), lambda: {{"built": True, "sources": "old"}}
assert "of other sources" in library.load()
library.load.cache_clear()
library.status = lambda: {{"built": True, "sources": {csrc.source_hash()!r}}}
runtime = library.versions()[0]
library.versions = lambda: (13000, 12080)
assert "holds the runtime of CUDA 13, and the driver serves CUDA 12: update the driver" in library.load()
library.load.cache_clear()
library.versions = lambda: (12080, 12040)
assert library.load() is None
def meta(*shape): return torch.empty(*shape, dtype=torch.bfloat16, device="meta")
x, W, A0, B0 = meta(5, 16), meta(8, 16), meta(3, 16), meta(8, 3)
problems = [
    LoraLinear(x, W, None, A0, B0, A0, B0, 1.0),
    LoraLinear(x, W, None, A0, None, None, B0, 1.0),
    LoraLinear(x, W, None, A0, B0, A0, B0, 1.0, x, two_streams=True),
    LoraLinear(x, W, None, A0, None, None, B0, 1.0, two_streams=True),
]
said = {{}}
for name, change in (("linlora", [""]), ("linlora_cuda", [])):  # of Triton's configuration
    operator = getattr(torch.ops, name).lora_linear
    said[name] = {{
        "schema": str(operator.default._schema),
        "shapes": [
            [list(y.shape) for y in operator(tensors, *numbers, save, primal, *change)]
            for tensors, numbers in map(pack, problems) for save in (True, False) for primal in (True, False)
        ],
    }}

import linlora
from linlora import functional
from linlora.ops import choice
from torch._subclasses.fake_tensor import FakeTensorMode
calls = []
def spy(graph, inputs):
    calls.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("linlora"))
    return graph.forward
with choice.made("cuda"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    def fake(*shape): return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
    x, W, A0, B0 = fake(72, 16), fake(8, 16), fake(3, 16), fake(8, 3)
    def layer(x): return functional.linearized_lora_linear(x, W, None, A0, B0, A0, B0, 1.0)
    def dual(x): return functional.lora_linear(x, W, None, A0, B0, A0, B0, 1.0, x)
    for function in (layer, dual):
        torch.compile(function, backend=spy, fullgraph=True)(x)
said["compiled"], said["runtime"] = calls, runtime
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_operator_has_the_schema_of_the_triton_operator(operators):
    ours, extras = operators["linlora_cuda"]["schema"], ", *, Tensor? counters=None, int kernel=0"
    assert extras in ours
    assert ", str change)" in operators["linlora"]["schema"]
    tritons = operators["linlora"]["schema"].replace(", str change)", ")")
    assert ours.replace(extras, "").replace("linlora_cuda::", "linlora::") == tritons


def test_the_operator_has_a_fake_function_like_the_triton_operator(operators):
    assert operators["linlora_cuda"]["shapes"] == operators["linlora"]["shapes"]
    assert operators["linlora_cuda"]["shapes"][0] == [[5, 8], [5, 3], [5, 3]]


def test_torch_compile_sees_the_operator_as_one_call(operators):
    assert operators["compiled"] == ["linlora_cuda.lora_linear"] * 2


def test_the_runtime_in_the_library_is_that_of_the_compiler(built, operators):
    major, minor = json.loads((built / csrc.STATUS).read_text())["nvcc"].split(".")
    assert operators["runtime"] == 1000 * int(major) + 10 * int(minor)


def test_the_library_is_bound_to_no_python_and_to_no_version_of_torch(built):
    """What it takes from others is torch's stable C interface, by its headers, or has a version of its own (libc)."""
    if (nm := shutil.which("nm")) is None:
        pytest.skip("nm is not installed (binutils)")
    undefined = subprocess.run(
        [nm, "-D", "--undefined-only", built / csrc.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1] for line in undefined.splitlines()} - {
        "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable",
    }  # fmt: skip
    headers = Path(csrc.toolchain().torch, "include", "torch", "csrc")
    shims = [*headers.glob("inductor/aoti_torch/c/*.h"), *headers.glob("stable/c/*.h")]
    stable = set(re.findall(r"\b(?:aoti_)?torch_\w+", "".join(shim.read_text() for shim in shims)))
    unknown = {symbol for symbol in symbols if "@" not in symbol} - stable
    assert {"aoti_torch_empty_strided", "torch_library_impl"} <= symbols
    assert not unknown


def test_the_status_says_what_was_built(built):
    status = json.loads((built / csrc.STATUS).read_text())
    assert status["built"]
    assert status["architectures"] == ["80", "90a", "100"]
    assert status["bytes"] == (built / csrc.LIBRARY).stat().st_size < 20 * 2**20
    assert status["sources"] == csrc.source_hash()


@pytest.fixture
def nvcc_of(tmp_path):
    """A function that writes an nvcc of a version, which lists what it compiles for."""

    def nvcc_of(version, codes):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        listed = " ".join(f"sm_{code}" for code in codes)
        nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {version}, V{version}" || echo "{listed}"\n')
        nvcc.chmod(0o755)
        return str(nvcc)

    return nvcc_of


def test_architectures_are_chosen_by_the_environment(monkeypatch, nvcc_of):
    tools = csrc.Toolchain("/opt/a cuda/nvcc", "ninja", "/opt/torch")
    nvcc = nvcc_of("12.8", [80, 90, 100])
    monkeypatch.setenv("LINLORA_CUDA_ARCHITECTURES", "100; 80")
    assert csrc.selected_architectures(nvcc) == ("80", "100")
    ninja = csrc.ninja_file(tools, ("80", "100"), OBJECTS)
    assert "lora_linear_sm90" not in ninja  # Hopper's alone
    assert "LINLORA_SM90" not in ninja
    assert "nvcc = '/opt/a cuda/nvcc'" in ninja
    assert "code=compute_80" in ninja  # for GPUs that are not named
    assert "-DLINLORA_SM90" in csrc.ninja_file(tools, ("90a",), OBJECTS)
    monkeypatch.setenv("LINLORA_CUDA_ARCHITECTURES", "90")
    with pytest.raises(csrc.CannotBuildError, match=r"'90' is not one of 80; 90a; 100"):
        csrc.selected_architectures(nvcc)


def test_a_compiler_is_asked_for_no_more_than_it_knows(monkeypatch, nvcc_of):
    monkeypatch.delenv("LINLORA_CUDA_ARCHITECTURES", raising=False)
    nvcc = nvcc_of("12.6", [80, 86, 90])
    assert csrc.selected_architectures(nvcc) == ("80", "90a")
    monkeypatch.setenv("LINLORA_CUDA_ARCHITECTURES", "80;100")
    with pytest.raises(csrc.CannotBuildError, match=r"nvcc 12\.6 does not compile for sm_100: CUDA 12\.8 "):
        csrc.selected_architectures(nvcc)


def test_a_compiler_that_is_too_old_is_refused_with_the_minimum(monkeypatch, nvcc_of, tmp_path):
    nvcc_of("12.4", [80, 90])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(csrc.CannotBuildError, match=r"is of CUDA 12\.4, and CUDA 12\.6 or later is needed"):
        csrc.toolchain()


def test_everything_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(csrc, "_torch", lambda: None)
    with pytest.raises(csrc.CannotBuildError) as error:
        csrc.toolchain()
    for word in ("nvcc", "ninja", "torch"):
        assert word in str(error.value)


def test_what_ptxas_said_is_read(tmp_path):
    (tmp_path / "build.ninja").write_text("build a.o: compile a.cu\n")
    (tmp_path / "a.o.log").write_text(
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
    )
    (tmp_path / "stale.o.log").write_text("no object of this build\n")
    assert csrc.reports(tmp_path) == [csrc.KernelReport("_Z1kPf", "90a", 168, 24)]
    spills, serialized = csrc.problems(tmp_path)
    assert "sm_90a spills 24 bytes" in spills
    assert "serialized" in serialized


def test_a_failed_build_is_one_line_with_what_to_do(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "x.cu(1): error: no\nmore", "")
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path), "--objects", str(tmp_path / "objects")])
    monkeypatch.setattr(csrc, "toolchain", lambda: csrc.Toolchain("nvcc", "ninja", "/none"))
    monkeypatch.setattr(csrc, "selected_architectures", lambda _: ("80",))
    monkeypatch.setattr(csrc.subprocess, "run", lambda *_, **__: failed)
    assert csrc.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a compilation failed (x.cu(1): error: no): see " in line
    assert line.endswith("`make cuda` tries again, and linlora runs without them")
    assert not json.loads((tmp_path / csrc.STATUS).read_text())["built"]
