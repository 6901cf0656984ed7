"""Which backend runs: asked for by name, or proven by a committed run; never a silent fallback."""

import contextlib
import json

import pytest
import torch

import linlora
from linlora import backends, functional, kernels
from linlora.ops import aten

GREEN = {"op": "lora_linear", "backend": "triton", "correct": True, "speedup_over_torch": 1.3}


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """Write runs where bench/results/ would be; nothing is remembered from one test to the next."""
    from linlora import bench

    monkeypatch.setattr(bench, "__path__", [str(tmp_path)])

    def write(*entries, architecture="sm_90"):
        folder = tmp_path / "results" / "gpu"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"architecture": architecture, "evidence": list(entries)}))

    def forget():
        backends._evidence.cache_clear()
        backends.proven.cache_clear()

    forget()
    yield write
    forget()


def test_a_kernel_is_proven_by_a_green_and_faster_run_on_its_architecture(evidence):
    evidence(GREEN)
    assert backends.proven("triton", "lora_linear", "sm_90")
    assert not backends.proven("triton", "lora_linear", "sm_80")
    assert not backends.proven("triton", "linearized_lora_linear", "sm_90")
    assert not backends.proven("cuda", "lora_linear", "sm_90")


@pytest.mark.parametrize(
    "entry", [{**GREEN, "correct": False}, {**GREEN, "speedup_over_torch": 0.9}], ids=["red", "slow"]
)
def test_a_red_or_slower_run_proves_nothing(evidence, entry):
    evidence(entry)
    assert not backends.proven("triton", "lora_linear", "sm_90")


def test_runs_without_evidence_are_passed_over(evidence):
    assert not backends.proven("triton", "lora_linear", "sm_90")


def test_the_gpu_runs_what_is_proven_for_the_op(evidence, monkeypatch):
    evidence(GREEN)
    monkeypatch.setattr(backends, "architecture", lambda *_: "sm_90")
    assert backends.select(torch.device("cuda", 0), "lora_linear") is kernels
    assert backends.select(torch.device("cuda", 0), "linearized_lora_linear") is aten
    assert backends.select(torch.device("cpu"), "lora_linear") is aten


def test_use_backend_nests_and_is_undone_by_errors(device):
    here, before = torch.device(device), backends.select(torch.device(device), "lora_linear")
    with linlora.use_backend("triton"):
        assert backends.select(here, "lora_linear") is kernels
        with contextlib.suppress(ZeroDivisionError), linlora.use_backend("torch"):
            assert backends.select(here, "lora_linear") is aten
            raise ZeroDivisionError
        assert backends.select(here, "lora_linear") is kernels
    assert backends.select(here, "lora_linear") is before


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch, device):
    calls = []
    original = kernels.linearized_lora_linear
    monkeypatch.setattr(
        kernels, "linearized_lora_linear", lambda *a, **k: (calls.append(k.get("adjoint", False)), original(*a, **k))[1]
    )
    x, weight, A0, dB = (torch.randn(*shape, device=device) for shape in ((3, 8), (6, 8), (2, 8), (6, 2)))
    x.requires_grad_()
    with linlora.use_backend("triton"):
        y = functional.linearized_lora_linear(x, weight, None, A0, None, None, dB, 1.0)
    y.sum().backward()
    assert calls == [False, True]


def test_a_backend_that_cannot_run_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(kernels, "availability", lambda device: "no CUDA device; use backend 'torch'")
    message = "'triton' cannot run here: no CUDA device; use backend"
    with pytest.raises(linlora.BackendUnavailableError, match=message), linlora.use_backend("triton"):
        pass


def test_explain_names_the_backend_and_the_reason_for_each(monkeypatch, device):
    monkeypatch.setattr(kernels, "availability", lambda device: "no CUDA device")
    text = str(linlora.explain("lora_linear", "cpu"))
    assert text.splitlines()[0] == "lora_linear on cpu runs on 'torch'"
    assert "triton  not available: no CUDA device" in text
    assert "cuda    not available: this build of linlora holds no CUDA kernels" in text
    assert "torch   chosen automatically" in text
    monkeypatch.undo()
    with linlora.use_backend("triton"):
        explanation = linlora.explain("lora_linear", device)
    assert (explanation.backend, explanation.reasons["triton"]) == ("triton", "asked for with use_backend")


def test_automatic_choice_is_a_constant_of_compiled_code():
    def choice(x):
        return x + (backends.select(x.device, "lora_linear") is aten)

    assert torch.compile(choice, fullgraph=True, backend="eager")(torch.zeros(())) == 1.0
