"""Which backend runs: asked for by name, or proven by measurement; never a silent fallback."""

import contextlib
from dataclasses import replace

import pytest
import torch
from fake_gpu import entry
from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.kernels.problem import LoraLinear

import linlora
from linlora import functional, kernels
from linlora.ops import aten, backends, cuda, dual, evidence
from linlora.ops.evidence import Call

CALL = Call("lora_linear", (2048, 64, 4096), "bfloat16", 16)


def layer(x, weight, rank=16, dropout_p=0.0):
    """Two streams."""
    factors = weight.new_empty(rank, weight.shape[1]), None, None, weight.new_empty(weight.shape[0], rank)
    return LoraLinear(x, weight, None, *factors, 1.0, None, dropout_p, two_streams=True)


def chosen(rows=2048, outputs=4096, dtype=torch.bfloat16, **call):
    """The backend of a call like CALL."""
    x, weight = torch.empty(2, rows // 2, 64, dtype=dtype), torch.empty(outputs, 64, dtype=dtype)
    return backends.select_layer(layer(x, weight, **call))


def test_a_kernel_is_chosen_where_it_was_correct_and_faster(gpu):
    evidence.add([entry(CALL, triton=1.3)])
    assert chosen() is kernels
    assert backends.select(torch.device("cpu"), "linear", CALL.size, torch.bfloat16) is aten


@pytest.mark.parametrize(
    "call",
    [{"rows": 64}, {"outputs": 256}, {"dtype": torch.float32}, {"dropout_p": 0.1}, {"rank": 17}],
    ids=lambda call: next(iter(call)),
)
def test_what_was_not_measured_is_not_proven(gpu, call):
    evidence.add([entry(CALL, triton=1.3)])
    assert chosen(**call) is aten


def test_routed_layers_of_both_scopes_ask_for_their_own_size(gpu):
    x, W, A0, B0 = torch.randn(2, 32, 64), torch.randn(128, 64), torch.randn(4, 64), torch.randn(128, 4)
    A, B, groups = torch.randn(2, 64, 4), torch.randn(2, 4, 128), functional.Groups.of(torch.tensor([1, 0]), 2, 64)
    functional.grouped_lora_linear(x, W, None, A, B, groups, 1.0)
    assert [call.size for call in backends.calls_met()] == [(64, 64, 128)]
    dual.grouped_lora_linear(GroupedLoraLinear(x, W, None, A0, B0, A, B, groups, 1.0))
    assert [call.size for call in backends.calls_met()] == [(64, 64, 128)]


@pytest.mark.parametrize("outcome", ["wrong", "failed", "unavailable", 0.9, 1.01])
def test_a_wrong_or_slower_kernel_is_never_chosen(gpu, outcome):
    evidence.add([entry(CALL, triton=outcome)])
    assert chosen() is aten


def test_a_kernel_that_is_slower_in_one_case_is_not_chosen(gpu):
    found = entry(CALL, triton=1.3)
    torch_, triton = found.candidates["torch"], found.candidates["triton"]
    torch_, triton = replace(torch_, microseconds=(100.0, 10.0)), replace(triton, microseconds=(20.0, 11.0))
    evidence.add([replace(found, cases=("a", "b"), candidates={"torch": torch_, "triton": triton})])
    assert chosen() is aten


def test_the_fastest_of_several_is_chosen_if_it_can_run(gpu):
    evidence.add([entry(CALL, triton=1.3, cuda=1.4)])
    assert chosen() is cuda
    gpu.obstacles["cuda"] = "not built"
    backends.decide_again()
    assert chosen() is kernels


def test_the_nearest_size_decides_and_the_lowest_rank_that_covers_the_call(gpu):
    evidence.add([entry(CALL, triton=1.3), entry(CALL._replace(size=(512, 64, 4096)), triton=0.8)])
    evidence.add([entry(CALL._replace(rank=64), cuda=1.3)])
    assert chosen(rows=2048) is kernels
    assert chosen(rows=3000) is kernels
    assert chosen(rows=256) is aten
    assert chosen(rank=17) is cuda


def test_the_choice_of_a_call_is_made_once(gpu, monkeypatch):
    evidence.add([entry(CALL, triton=1.3)])
    assert chosen() is kernels
    monkeypatch.setattr(evidence, "decisive", None)
    assert chosen() is kernels


def test_a_layer_runs_on_the_kernel_that_its_evidence_proves(gpu, monkeypatch):
    runs = []
    original = kernels.lora_linear
    monkeypatch.setattr(kernels, "lora_linear", lambda *a, **k: (runs.append("triton"), original(*a, **k))[1])
    x, weight, A0, dB = (torch.randn(*shape) for shape in ((48, 32), (40, 32), (4, 32), (40, 4)))
    with torch.no_grad():
        before = functional.linearized_lora_linear(x, weight, None, A0, None, None, dB, 2.0)
        assert runs == []
        evidence.add([entry(Call("linearized_lora_linear", (48, 32, 40), "float32", 4), triton=1.5)])
        backends.decide_again()
        after = functional.linearized_lora_linear(x, weight, None, A0, None, None, dB, 2.0)
    assert runs == ["triton"]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_on_a_cpu_torch_runs(monkeypatch):
    monkeypatch.setattr(evidence, "decisive", None)  # nobody asks for evidence
    assert backends.select(torch.device("cpu"), *CALL[:2]) is aten
    assert chosen() is aten


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
    original = kernels.lora_linear
    monkeypatch.setattr(
        kernels, "lora_linear", lambda problem, **k: (calls.append(problem.masks_update), original(problem, **k))[1]
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16, got float32.*torch.autocast"),
        ({"dropout_p": 0.1}, "no dropout: use the 'triton' backend"),
        ({"rank": 257}, "ranks to 256, got 257"),
    ],
    ids=["float32", "dropout", "rank"],
)
def test_a_call_that_cuda_does_not_serve_is_an_error_with_the_remedy(monkeypatch, device, options, said):
    monkeypatch.setattr(cuda, "availability", lambda device: None)
    options = {"dtype": torch.bfloat16, "rank": 2, "dropout_p": 0.0, **options}
    dtype, rank = options["dtype"], options["rank"]
    x, weight, A0, dB = (
        torch.randn(*shape, device=device, dtype=dtype) for shape in ((3, 8), (6, 8), (rank, 8), (6, rank))
    )
    seed = torch.tensor(1, device=device)
    message = f"'cuda' cannot run linearized_lora_linear on {device}.*: .*{said}"
    with linlora.use_backend("cuda"), pytest.raises(linlora.BackendUnavailableError, match=message):
        functional.linearized_lora_linear(
            x, weight, None, A0, None, None, dB, 1.0, dropout_p=options["dropout_p"], seed=seed
        )


def test_cuda_has_every_other_op_from_triton():
    assert cuda.attention is kernels.attention
    assert cuda.factor_gradients is kernels.factor_gradients
    assert cuda.lora_linear is not kernels.lora_linear
    with pytest.raises(AttributeError):
        _ = cuda.matmul


def test_explain_names_the_backend_and_the_reason_for_each(monkeypatch, device):
    monkeypatch.setattr(kernels, "availability", lambda device: "no CUDA device")
    monkeypatch.setattr(cuda, "availability", lambda device: "this build of linlora holds no CUDA kernels")
    text = str(linlora.explain("lora_linear", "cpu"))
    assert text.splitlines()[0] == "lora_linear on cpu runs on 'torch'"
    assert "triton  not available: no CUDA device" in text
    assert "cuda    not available: this build of linlora holds no CUDA kernels" in text
    assert "torch   chosen automatically" in text
    monkeypatch.undo()
    with linlora.use_backend("triton"):
        explanation = linlora.explain("lora_linear", device)
    assert (explanation.backend, explanation.reasons["triton"]) == ("triton", "asked for with use_backend")


def test_explain_cites_the_measurement(gpu):
    def explained(**options):
        return linlora.explain("lora_linear", "cpu", **{"shape": CALL.size, "dtype": torch.bfloat16, **options})

    assert "not yet run on a GPU, not measured here on such a call: `linlora tune`" in explained().reasons["triton"]
    evidence.add([entry(CALL, triton=1.3, cuda="wrong"), entry(CALL._replace(size=(16, 64, 4096)), triton=0.8)])
    backends.decide_again()
    large = explained()
    assert str(large).startswith("lora_linear on cpu (lora_linear 2048×64×4096 r16 bfloat16) runs on 'triton'")
    measured = "lora_linear 2048×64×4096 r16 bfloat16, NVIDIA H200, 2026-01-02"
    assert large.reasons["triton"] == f"chosen automatically: 1.30x composed torch, {measured}"
    assert large.reasons["cuda"] == f"available on request; wrong (y: rel err 1e0), {measured}"
    assert "the chosen backend is faster" in large.reasons["torch"]
    small = explained(shape=(16, 64, 4096))
    assert (small.backend, "0.80x composed torch" in small.reasons["triton"]) == ("torch", True)
    assert "no kernel is faster" in small.reasons["torch"]
    assert "run on NVIDIA H200, not measured here on such a call" in explained(rank=128).reasons["triton"]


def test_explain_says_what_runs_on_triton_under_cuda(monkeypatch, device):
    monkeypatch.setattr(cuda, "availability", lambda device: None)
    with linlora.use_backend("cuda"):
        attention = linlora.explain("attention", device)
        layer = linlora.explain("lora_linear", device, dtype=torch.bfloat16)
        dropped = linlora.explain("lora_linear", device, dropout=True)
    assert attention.backend == "triton"
    assert attention.reasons["triton"] == "asked for with use_backend('cuda')"
    assert "no kernel of this op" in attention.reasons["cuda"]
    assert layer.backend == "cuda"
    assert "no dropout" in dropped.reasons["cuda"]


def test_the_factor_gradients_run_with_their_layer(gpu):
    evidence.add([entry(CALL._replace(op="linearized_lora_linear"), cuda=1.3)])
    asked = {"shape": CALL.size, "dtype": torch.bfloat16}
    assert linlora.explain("factor_gradients", "cpu", **asked).backend == "triton"


def test_automatic_choice_is_a_constant_of_compiled_code(gpu):
    def choice(x, weight):
        return x + (backends.select_layer(layer(x, weight)) is kernels)

    evidence.add([entry(CALL, triton=1.3)])
    compiled = torch.compile(choice, fullgraph=True, backend="eager")
    weight = torch.zeros(4096, 64, dtype=torch.bfloat16)
    for rows, expected in ((2048, 1.0), (2000, 1.0), (16, 0.0)):
        assert compiled(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)[0, 0] == expected
