"""Which backend runs: asked for by name, or proven by a committed run; never a silent fallback."""

import contextlib
import json

import pytest
import torch
from linlora.kernels.problem import LoraLinear

import linlora
from linlora import functional, kernels
from linlora.ops import aten, backends, cuda
from linlora.ops import evidence as found

GREEN = {
    "op": "lora_linear",
    "backend": "triton",
    "shape": "large",
    "dtype": "bfloat16",
    "dropout": False,
    "correct": True,
    "speedup_over_torch": 1.3,
    "max_rank": 64,
    "cases": 3,
}
HOPPER = torch.device("cuda", 0)
CALL = {"shape": "large", "dtype": torch.bfloat16, "rank": 16}


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """Adds to the table of evidence, which is empty at first; nothing is remembered from one test to the next."""
    written = []
    monkeypatch.setattr(found, "TABLE", tmp_path / "evidence.json")

    def write(*entries, date="2026-01-01"):
        about = {"architecture": "sm_90", "date": date, "gpu": "NVIDIA H200", "commit": "abc"}
        written.extend({**entry, **about, "file": f"bench/results/gpu/run-{date}.json"} for entry in entries)
        found.TABLE.write_text(json.dumps(written))

    write()

    def forget():
        found.entries.cache_clear()
        backends._fastest.cache_clear()

    forget()
    yield write
    forget()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of sm_90 on which every backend could run."""
    monkeypatch.setattr(backends, "architecture", lambda *_: "sm_90")
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)


def layer(x, weight):
    """Two streams, of rank 16."""
    factors = weight.new_empty(16, weight.shape[1]), None, None, weight.new_empty(weight.shape[0], 16)
    return LoraLinear(x, weight, None, *factors, 1.0, two_streams=True)


def chosen(op="lora_linear", **call):
    return backends.automatic("cuda", 0, op, **{**CALL, **call})


def test_a_kernel_is_chosen_where_a_run_was_green_and_faster(evidence, hopper, monkeypatch):
    evidence(GREEN)
    assert chosen() == "triton"
    assert chosen("linearized_lora_linear") == "torch"
    monkeypatch.setattr(backends, "architecture", lambda *_: "sm_80")
    backends._fastest.cache_clear()
    assert chosen() == "torch"


@pytest.mark.parametrize(
    "call",
    [{"shape": "small"}, {"dtype": torch.float32}, {"dropout": True}, {"rank": 65}],
    ids=lambda call: next(iter(call)),
)
def test_what_no_run_measured_is_not_proven(evidence, hopper, call):
    evidence(GREEN)
    assert chosen(**call) == "torch"


@pytest.mark.parametrize("change", [{"correct": False}, {"speedup_over_torch": 0.9}], ids=["red", "slow"])
def test_a_red_or_slower_run_proves_nothing(evidence, hopper, change):
    evidence({**GREEN, **change})
    assert chosen() == "torch"


def test_the_fastest_of_several_is_chosen_if_it_can_run(evidence, hopper, monkeypatch):
    evidence(GREEN, {**GREEN, "backend": "cuda", "speedup_over_torch": 1.4})
    assert chosen() == "cuda"
    monkeypatch.setattr(backends, "unavailable", lambda name, device: "not built" if name == "cuda" else None)
    backends._fastest.cache_clear()
    assert chosen() == "triton"


def test_the_newest_run_decides(evidence, hopper):
    evidence(GREEN, date="2026-01-01")
    evidence({**GREEN, "correct": False}, date="2026-01-02")
    assert chosen() == "torch"
    evidence(GREEN, date="2026-01-03")
    found.entries.cache_clear()
    backends._fastest.cache_clear()
    assert chosen() == "triton"


def test_an_op_is_told_from_its_calls(evidence, hopper, monkeypatch):
    evidence(GREEN)
    monkeypatch.setattr(torch.Tensor, "device", HOPPER)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    weight = torch.empty(4096, 16, dtype=torch.bfloat16)
    for rows, expected in ((2048, kernels), (64, aten)):
        x = torch.empty(2, rows // 2, 16, dtype=torch.bfloat16)
        assert backends.select_layer(layer(x, weight)) is expected
    assert backends.select_layer(layer(torch.empty(2048, 16), weight)) is aten


def test_on_a_cpu_torch_runs(evidence):
    evidence(GREEN)
    assert backends.select(torch.device("cpu"), "lora_linear", **CALL) is aten


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


def test_explain_cites_the_run(evidence, hopper):
    assert "available on request; not yet run on a GPU" in linlora.explain("lora_linear", HOPPER).reasons["triton"]
    evidence(GREEN, {**GREEN, "shape": "small", "speedup_over_torch": 0.8})
    found.entries.cache_clear()
    backends._fastest.cache_clear()
    large = linlora.explain("lora_linear", HOPPER, shape=(8192, 64, 4096), dtype=torch.bfloat16)
    assert str(large).startswith("lora_linear on cuda:0 (large shapes in bfloat16) runs on 'triton'")
    assert large.reasons["triton"] == (
        "chosen automatically: 1.30x composed torch: 3 cases, large shapes in bfloat16, NVIDIA H200, "
        "bench/results/gpu/run-2026-01-01.json"
    )
    assert large.reasons["cuda"] == "available on request; not yet run on a GPU"
    assert "the chosen backend is faster" in large.reasons["torch"]
    small = linlora.explain("lora_linear", HOPPER, shape=(16, 64, 4096), dtype=torch.bfloat16)
    assert (small.backend, "slower than torch, or wrong: 0.80x" in small.reasons["triton"]) == ("torch", True)
    dropped = linlora.explain("lora_linear", HOPPER, dropout=True)
    assert "run on NVIDIA H200, but no run" in dropped.reasons["triton"]
    assert "proven up to rank 64 only" in linlora.explain("lora_linear", HOPPER, rank=128).reasons["triton"]


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


def test_the_factor_gradients_run_with_their_layer(evidence, hopper):
    evidence({**GREEN, "op": "linearized_lora_linear", "backend": "cuda"})
    assert linlora.explain("factor_gradients", HOPPER).backend == "triton"


def test_automatic_choice_is_a_constant_of_compiled_code():
    def choice(x):
        return x + (backends.select_layer(layer(x, x)) is aten)

    assert torch.compile(choice, fullgraph=True, backend="eager")(torch.zeros(2, 2)).sum() == 4.0
