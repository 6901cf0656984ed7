"""The problem of a LoRA layer: its adjoint, its outputs, its packing; every backend keeps to it."""

import ast
from pathlib import Path

import pytest
import torch
from kernel_oracles import layer
from linlora.kernels.packing import Output, empty, pack, present, restored, schema, unpack
from linlora.kernels.problem import FactorGradients, LoraLinear

from linlora import kernels, reference
from linlora.ops import aten

FORMS = pytest.mark.parametrize("short", [False, True], ids=["pair", "short"])
STREAMS = pytest.mark.parametrize("two_streams", [False, True], ids=["one-stream", "two-streams"])


def same(one, other):
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(one, other, strict=True))


@FORMS
@STREAMS
def test_the_adjoint_of_the_adjoint_is_the_layer(device, short, two_streams):
    problem = layer(5, 7, 6, 2, torch.float32, device, short=short, two_streams=two_streams)._replace(bias=None)
    g, g_tangent = torch.randn(5, 7, device=device), torch.randn(5, 7, device=device)
    inputs = (problem.x_tangent, problem.x) if two_streams else (problem.x,)
    assert same(problem.adjoint(g, g_tangent).adjoint(*inputs), problem)


@FORMS
@STREAMS
def test_the_adjoint_gives_the_gradients_of_the_inputs(device, short, two_streams):
    problem = layer(5, 7, 6, 2, torch.float64, device, short=short, two_streams=two_streams)
    x, x_tangent = (None if t is None else t.clone().requires_grad_() for t in (problem.x, problem.x_tangent))
    inputs, arguments = ((x, x_tangent), (x, *problem[1:8], x_tangent)) if two_streams else ((x,), (x, *problem[1:8]))
    outputs = getattr(reference, problem.op)(*arguments)
    outputs = outputs if two_streams else (outputs,)
    cotangents = [torch.randn_like(y) for y in outputs]
    found = aten.lora_linear(problem.adjoint(*cotangents))
    expected = torch.autograd.grad(outputs, inputs, cotangents)
    torch.testing.assert_close((found.y_tangent, found.y) if two_streams else (found.y,), expected)


@FORMS
@STREAMS
@pytest.mark.parametrize("save", [True, False], ids=["saves", "forgets"])
@pytest.mark.parametrize("primal", [True, False], ids=["primal", "no-primal"])
def test_a_kernel_returns_what_the_problem_says(device, short, two_streams, save, primal):
    problem = layer(5, 7, 6, 2, torch.float32, device, short=short, two_streams=two_streams)
    said = problem.outputs(save, primal)
    for found in (kernels.lora_linear(problem, save=save, primal=primal), empty(said, problem.x)):
        assert tuple(None if y is None else Output(tuple(y.shape), y.dtype) for y in found) == tuple(said)
    result = aten.lora_linear(problem, save=save, primal=primal)
    assert all(y is not None for y, wanted in zip(result, said, strict=True) if wanted is not None)


def test_what_is_packed_is_unpacked(device):
    problem = layer(5, 7, 6, 2, torch.float32, device, short=True)
    tensors, numbers = pack(problem)
    assert len(tensors) + len(numbers) == len(problem)
    assert same(unpack(LoraLinear, tensors, numbers), problem)
    result = aten.lora_linear(problem)
    assert same(restored(problem.outputs(), present(result)), result)


def test_the_schema_of_an_operator_is_its_problem():
    numbers = "float scaling, float dropout_p, bool two_streams, bool masks_update"
    assert schema(LoraLinear, {"save": True}) == f"(Tensor?[] tensors, {numbers}, bool save) -> Tensor[]"
    assert schema(FactorGradients, {}) == (
        "(Tensor?[] tensors, float scaling, ScalarType dtype, float dropout_p) -> Tensor[]"
    )


def test_what_linlora_reads_of_the_kernels_needs_no_triton():
    root = Path(kernels.__file__).parent
    imports = {path: list(ast.walk(ast.parse(path.read_text()))) for path in root.glob("*.py")}
    linlora = root.parent / "linlora"
    asked = {
        node.module.rpartition(".")[2]
        for path in [*(linlora / "ops").rglob("*.py"), *(linlora / "layers").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("linlora.kernels.")
    }
    assert {"problem", "attention_problem", "norm_problem"} <= asked
    while asked:
        path = root / f"{asked.pop()}.py"
        for node in imports.pop(path, ()):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("triton") for name in node.names), f"{path.name} imports Triton"
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("triton"), f"{path.name} imports Triton"
                asked |= {node.module} if node.level and node.module else set()
