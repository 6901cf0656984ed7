"""Bad arguments: each refused with the op, the argument, its shape and the remedy."""

import pytest
import torch

import linlora
from linlora import functional
from linlora.ops import dual
from linlora.ops.cuda import library

SEED = "seed is a 0-d int64 tensor on cpu, got torch.int64"
BAD = {
    "wrong-features": (
        dict(x=torch.randn(3, 5)),
        "5 features in its last dimension, weight \\(7, 11\\) takes 11",
    ),
    "scalar-x": (dict(x=torch.tensor(1.0)), "x \\(\\.\\.\\., K\\)"),
    "rank-mismatch": (dict(dB=torch.randn(7, 4)), "dB \\(7, 3\\) are expected, got .*dB \\(7, 4\\)"),
    "missing-dA": (dict(dA=None), "dA is missing"),
    "shape-of-B0": (dict(B0=torch.randn(6, 3)), "B0 \\(6, 3\\)"),
    "shape-of-bias": (dict(bias=torch.randn(6)), "bias \\(7,\\) is expected"),
    "integer-x": (dict(x=torch.ones(3, 11, dtype=torch.long)), "int64: use float32"),
    "dtype-of-x": (dict(x=torch.randn(3, 11).half()), "weight is torch.float32: cast x, or run under torch.autocast"),
    "dtype-of-factor": (dict(dB=torch.randn(7, 3).half()), "dB is torch.float16"),
    "device-of-factor": (dict(dB=torch.randn(7, 3, device="meta")), "dB is on meta, x on cpu"),
    "device-of-weight": (dict(weight=torch.randn(7, 11, device="meta")), "weight is on meta"),
    "device-of-bias": (dict(bias=torch.randn(7, device="meta")), "bias is on meta, x on cpu"),
    "gradient-of-scaling": (dict(scaling=torch.ones((), requires_grad=True)), "scaling asks for a gradient"),
    "probability": (dict(dropout_p=1.0), "dropout_p is 1.0"),
    "seed-like-a-mask": (dict(dropout_p=0.5, seed=torch.ones(3, 11, dtype=torch.long)), SEED + " \\(3, 11\\)"),
    "seed-of-a-float": (
        dict(dropout_p=0.5, seed=torch.tensor(1.5)),
        "seed is a 0-d int64 tensor on cpu, got torch.float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("op", ["linearized_lora_linear", "lora_linear"])
def test_bad_arguments_are_named(op, change, message):
    arguments = dict(
        x=torch.randn(3, 11), weight=torch.randn(7, 11), bias=torch.randn(7), A0=torch.randn(3, 11),
        B0=torch.randn(7, 3), dA=torch.randn(3, 11), dB=torch.randn(7, 3), scaling=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        getattr(functional, op)(**{**arguments, **change})


def test_tangent_has_to_be_like_x():
    factors = torch.randn(3, 11), None, None, torch.randn(7, 3)
    with pytest.raises(ValueError, match="x_tangent is expected like x"):
        functional.lora_linear(torch.randn(3, 11), torch.randn(7, 11), None, *factors, 1.0, torch.randn(2, 11))


def test_unknown_and_unavailable_backends(monkeypatch):
    monkeypatch.setattr(library, "status", lambda: {"built": False, "reason": "nvcc is not there"})
    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # remembers nothing
    with pytest.raises(ValueError, match="unknown backend 'cutlass': choose"), linlora.use_backend("cutlass"):
        pass
    with pytest.raises(linlora.BackendUnavailableError, match="no CUDA kernels"), linlora.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="unknown op"):
        linlora.explain("matmul")


HEADS = torch.randn(2, 3, 4, 8)
BAD_ATTENTION = {
    "integers": (dict.fromkeys("qkv", HEADS.long()), "q is torch.int64: use float32"),
    "complex-k": (dict(k=HEADS.to(torch.complex64)), "k is torch.complex64: use float32"),
    "float8": (dict.fromkeys("qkv", HEADS.to(torch.float8_e4m3fn)), "q is torch.float8_e4m3fn: use float32"),
    "device-of-k": (dict(k=HEADS.to("meta")), "k is on meta, q on cpu: move"),
    "device-of-tangent": (dict(v_tangent=HEADS.to("meta")), "v_tangent is on meta, q on cpu: move"),
    "device-of-mask": (dict(mask=torch.ones(4, 4, device="meta")), "the mask is on meta, q on cpu: move"),
    "mask-of-integers": (dict(mask=torch.ones(4, 4, dtype=torch.long)), "the mask is torch.int64: use bool, True"),
    "gradient-of-scale": (dict(scale=torch.ones((), requires_grad=True)), "scale asks for a gradient"),
    "probability": (dict(dropout_p=1.5, seed=torch.tensor(0)), "dropout_p is 1.5: a probability below 1"),
    "seedless": (dict(dropout_p=0.5), "dropout needs a seed"),
    "seeds": (dict(dropout_p=0.5, seed=torch.arange(4)), SEED + " \\(4,\\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ATTENTION.values(), ids=BAD_ATTENTION)
@pytest.mark.parametrize("op", [functional.attention, dual.attention], ids=["functional", "model scope"])
def test_bad_arguments_of_attention_are_named(op, change, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        op(**{**dict.fromkeys("qkv", HEADS), **change})
