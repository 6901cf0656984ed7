"""Random problems of routing, and their outputs and every gradient against the float64 reference."""

import contextlib

import torch

import linlora
from linlora import functional, reference
from linlora.testing import relative_error

FORMS = ("plain", "pair", "short")
PATHS = ("grouped", "activations")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1.5e-2}
FACTORS = ("A", "B", "A0", "B0", "mixture")


def make(
    shape=(4, 6), Q=2, S=3, T=5, rank=2, k=12, n=8, form="plain", bias=True, ids="batch", dropout_p=0.0, device="cpu"
):
    """Random float64 arguments of `routed_lora_linear`; ids for the first dimension ("batch"), for every row ("rows"),
    or none: a mixture for every row ("weights")."""
    lead = {"batch": shape[:1], "rows": shape, "weights": None}[ids]
    table = (T,) if lead is not None else shape
    return {
        **_layer(shape, rank, k, n, form, bias, dropout_p, device),
        "A": _normal(Q, S, k // Q, rank, scale=k**-0.5, device=device) if form != "short" else None,
        "B": _normal(Q, S, rank, n // Q, scale=rank**-0.5, device=device),
        "mixture": torch.softmax(_normal(*table, Q, S, device=device), -1),
        "task_ids": None if lead is None else torch.randint(T, lead, device=device),
    }


def make_grouped(
    shape=(4, 6), T=5, rank=2, k=12, n=8, form="plain", bias=True, ids="batch", dropout_p=0.0, device="cpu"
):
    """Random float64 arguments of `grouped_lora_linear`, with task_ids where it has groups."""
    lead = {"batch": shape[:1], "rows": shape}[ids]
    return {
        **_layer(shape, rank, k, n, form, bias, dropout_p, device),
        "A": _normal(T, k, rank, scale=k**-0.5, device=device) if form != "short" else None,
        "B": _normal(T, rank, n, scale=rank**-0.5, device=device),
        "task_ids": torch.randint(T, lead, device=device),
    }


def _layer(shape, rank, k, n, form, bias, dropout_p, device):
    layer = dict(
        x=_normal(*shape, k, device=device),
        weight=_normal(n, k, scale=k**-0.5, device=device),
        bias=_normal(n, device=device) if bias else None,
        scaling=0.75,
        dropout_p=dropout_p,
        seed=torch.tensor(20231, device=device) if dropout_p else None,
    )
    if form != "plain":
        layer["A0"] = _normal(rank, k, scale=k**-0.5, device=device)
    if form == "pair":
        layer["B0"] = _normal(n, rank, scale=rank**-0.5, device=device)
    return layer


def _normal(*size, scale=1.0, device="cpu"):
    return torch.randn(*size, dtype=torch.float64, device=device) * scale


def cast(arguments, dtype, factor_dtype=None, wrt=None):
    """The arguments in other dtypes, as leaves: all of them, or those named, ask for a gradient."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to(factor_dtype or dtype if name in FACTORS else dtype)
            value = value.requires_grad_(wrt is None or name in wrt)
        out[name] = value
    return out


def leaves(arguments):
    return {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def grouped(arguments):
    """`grouped_lora_linear` of these arguments, groups made of their task_ids."""
    arguments = dict(arguments)
    x, task_ids = arguments["x"], arguments.pop("task_ids")
    groups = functional.Groups.of(task_ids, arguments["B"].shape[0], x.numel() // x.shape[-1])
    return functional.grouped_lora_linear(**arguments, groups=groups)


def check(arguments, dtype=torch.float64, factor_dtype=None, wrt=None, tolerance=None, backend=None):
    """`routed_lora_linear`, or where there is no mixture `grouped_lora_linear`: the output and every gradient against
    the reference, in float64 at the values rounded to `dtype`."""
    tolerance = tolerance or TOLERANCE[dtype]
    rounded = cast(arguments, dtype, factor_dtype, wrt)
    exact = cast(rounded, torch.float64, wrt=wrt)
    routed = "mixture" in arguments
    with contextlib.nullcontext() if backend is None else linlora.use_backend(backend):
        y = functional.routed_lora_linear(**rounded) if routed else grouped(rounded)
    expected = (reference.routed_lora_linear if routed else reference.grouped_lora_linear)(**exact)
    g = torch.randn_like(y)
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance
    gradients = torch.autograd.grad(y, list(leaves(rounded).values()), g)
    exact_gradients = torch.autograd.grad(expected, list(leaves(exact).values()), g.double())
    for (name, leaf), actual, wanted in zip(leaves(rounded).items(), gradients, exact_gradients, strict=True):
        assert actual.dtype == leaf.dtype
        assert relative_error(actual, wanted) < tolerance, f"gradient of {name}"
