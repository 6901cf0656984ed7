"""LINLORA_VERIFY: a kernel that computes something else raises, on the call it is asked to look at."""

import pytest
import torch
from fake_gpu import Wrong
from linlora.kernels.attention_problem import Attention
from linlora.kernels.norm_problem import Norm
from linlora.kernels.problem import FactorGradients, LoraLinear

import linlora
from linlora import functional, kernels
from linlora.ops import aten, backends, cuda
from linlora.ops.neighbours import Neighbour
from linlora.ops.verification import KernelMismatchError, Verified, verified


def layer(**changed):
    x, weight, A0, dB = (torch.randn(*shape) for shape in ((5, 8), (6, 8), (2, 8), (6, 2)))
    return LoraLinear(x, weight, None, A0, None, None, dB, 0.5)._replace(**changed)


def test_without_the_variable_backends_are_as_they_are(monkeypatch):
    assert verified("triton", kernels) is kernels
    kinds = {name: of for name, of in backends._MODULES.items() if " " not in name}
    assert kinds == {"torch": aten, "triton": kernels, "cuda": cuda}
    assert all(type(of) is Neighbour for name, of in backends._MODULES.items() if " " in name)
    monkeypatch.setenv("LINLORA_VERIFY", "often")
    with pytest.raises(ValueError, match="'often': a number of calls"):
        verified("triton", kernels)


def test_every_nth_call_is_compared(monkeypatch):
    monkeypatch.setenv("LINLORA_VERIFY", "3")
    backend = verified("triton", Wrong(1.5))
    for _ in range(2):
        for _ in range(2):
            backend.lora_linear(layer())
        with pytest.raises(KernelMismatchError, match=r"lora_linear on 'triton': y \(5, 6\) torch.float32 is 5.0e-01"):
            backend.lora_linear(layer())


def test_every_op_but_those_of_routing_is_compared():
    backend = Verified("triton", kernels, 1)
    apart = [op for op in backends.OPS if op not in ("linearized_lora_linear", "layer_norm", "rms_norm")]
    ops = {*apart, "norm", "norm_backward", "attention_backward", "gated_activation_backward"} - {"routed_lora_linear"}
    assert all(getattr(backend, op) is not getattr(kernels, op) for op in ops)
    assert all(getattr(backend, op) is getattr(kernels, op) for op in ("grouped_lora_linear", "place", "group_rows"))


def test_neighbours_are_compared_too():
    backend = Verified("triton num_stages+1", Neighbour("num_stages+1"), 1)
    assert backend.lora_linear(layer()).y.shape == (5, 6)


def test_a_training_step_on_a_wrong_kernel_raises(monkeypatch):
    monkeypatch.setitem(backends._MODULES, "triton", Verified("triton", Wrong(1.01), 1))
    x, weight, _, A0, *_, dB, scaling = layer()[:8]
    with linlora.use_backend("triton"), pytest.raises(KernelMismatchError, match="report the shape"):
        functional.linearized_lora_linear(x.requires_grad_(), weight, None, A0, None, None, dB, scaling)


def test_results_that_are_lost_in_both_are_no_difference():
    x = torch.randn(5, 8)
    x[2] = torch.nan
    Verified("triton", Wrong(1.0), 1).lora_linear(layer(x=x))
    with pytest.raises(KernelMismatchError):
        Verified("triton", Wrong(1.5), 1).lora_linear(layer(x=x))
    with pytest.raises(KernelMismatchError):
        Verified("triton", Wrong(torch.nan), 1).lora_linear(layer())


def test_the_kernels_agree_with_the_composed_ops():
    backend, here = Verified("triton", kernels, 1), "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, g = (torch.randn(1, 2, 16, 16, device=here) for _ in range(4))
    problem = Attention(q, k, v, q, None, None, causal=True, scale=0.25)
    kept = backend.attention(problem)
    backend.attention_backward(problem.primal(), g, kept)
    x, gradient = torch.randn(6, 16, device=here), torch.randn(6, 16, device=here)
    norm = Norm(x, gradient, torch.ones(16, device=here), None, 1e-5, centered=True)
    backend.norm_backward(norm, gradient, backend.norm(norm))
    backend.activation(x, gradient, "gelu")
    backend.factor_gradients(FactorGradients(x, gradient, None, None, 2.0, torch.float32))
    backend.lora_linear(layer()._replace(**{n: t.to(here) for n, t in layer()._asdict().items() if torch.is_tensor(t)}))
