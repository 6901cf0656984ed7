"""The Triton kernels in the layout of Hugging Face's `kernels`."""

import ast
import base64
import hashlib
import importlib.util
import json
import sys

import pytest
import torch
from linlora.kernels import hub, library
from linlora.kernels.problem import LoraLinear


@pytest.fixture
def build(tmp_path):
    return hub.write(tmp_path)


@pytest.fixture
def package(build, monkeypatch):
    """The build, imported by its path under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        "of_the_hub", build / "__init__.py", submodule_search_locations=[str(build)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "of_the_hub", module)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("of_the_hub.")]:
        del sys.modules[name]


def test_the_build_computes_what_the_package_does(package, device):
    M, N, K, r = 20, 24, 16, 4
    tensors = [torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,), (r, K), (N, r), (r, K), (N, r))]
    found = package.lora_linear(package.problem.LoraLinear(*tensors, 0.5))
    for ours, theirs in zip(library.lora_linear(LoraLinear(*tensors, 0.5)), found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_the_build_imports_itself_torch_and_triton_alone(build):
    for path in build.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, path.name


def test_operators_have_a_namespace_of_this_build(package, build):
    name = json.loads((build / "metadata.json").read_text())["id"]
    assert name.startswith("_linlora_")
    assert hasattr(getattr(torch.ops, name), "lora_linear")


def test_the_metadata_has_the_hash_of_every_file(build):
    metadata = json.loads((build / "metadata.json").read_text())
    found = {path.name: path.read_bytes() for path in build.glob("*.py")}
    hashes = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in found.items()}
    assert metadata["digest"]["files"] == hashes


def test_a_folder_of_another_build_is_refused(build):
    hub.write(build.parents[1])
    (build / "old.py").write_text("")
    with pytest.raises(ValueError, match=r"old\.py is of another build: remove "):
        hub.write(build.parents[1])
