"""Mixing the inventories of all layers at once: every output and gradient, on both backends."""

import pytest
import torch

import linlora
from linlora import reference
from linlora.functional import mix_inventories
from linlora.testing import relative_error

BACKENDS = ("torch", "triton")
LAYERS = [(1, 8, 40, 33, 4, 5), (4, 3, 24, 1100, 1, 20), (2, 1, 200, 6, 3, 1)]  # Q, S, K, N, r, T


def inventories(device, dtype=torch.float64, weight_dtype=None, without_A=()):
    """Lists As, Bs, mixtures of layers that differ in every size."""
    As, Bs, mixtures = [], [], []
    for i, (Q, S, K, N, r, T) in enumerate(LAYERS):
        As.append(None if i in without_A else torch.randn(Q, S, K // Q, r, dtype=dtype, device=device))
        Bs.append(torch.randn(Q, S, r, N // Q, dtype=dtype, device=device))
        mixtures.append(torch.rand(T, Q, S, dtype=weight_dtype or dtype, device=device))
    return As, Bs, mixtures


def require_grad(lists, wrt=("A", "B", "w")):
    for name, tensors in zip("ABw", lists, strict=True):
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_(name in wrt)
    return [tensor for tensors in lists for tensor in tensors if tensor is not None and tensor.requires_grad]


def wide(lists):
    return tuple([None if t is None else t.detach().double() for t in tensors] for tensors in lists)


def outputs(lists):
    return [t for t in (*lists[0], *lists[1]) if t is not None]


DTYPES = {
    "fp32": (torch.float32, torch.float32, 1e-6),
    "bf16-skills": (torch.bfloat16, torch.float32, 1e-2),
    "fp16": (torch.float16, torch.float16, 2e-3),
}


@pytest.mark.parametrize("wrt", ["ABw", "w", "Bw"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_and_every_gradient_equal_the_reference(device, backend, dtypes, wrt):
    *dtypes, tolerance = dtypes
    layers = inventories(device, *dtypes, without_A=(1,))
    exact = wide(layers)
    leaves, exact_leaves = require_grad(layers, wrt), require_grad(exact, wrt)
    with linlora.use_backend(backend):
        mixed = outputs(mix_inventories(*layers))
    expected = outputs(reference.mix_inventories(*exact))
    used = [i for i, factor in enumerate(expected) if factor.requires_grad]
    assert [factor.requires_grad for factor in mixed] == [factor.requires_grad for factor in expected]
    g = [torch.randn_like(factor) for factor in mixed]
    gradients = torch.autograd.grad([mixed[i] for i in used], leaves, [g[i] for i in used])
    wanted = torch.autograd.grad([expected[i] for i in used], exact_leaves, [g[i].double() for i in used])
    for actual, exact_one in zip((*mixed, *gradients), (*expected, *wanted), strict=True):
        assert relative_error(actual, exact_one) < tolerance
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


def test_torch_backend_is_exact_and_passes_gradcheck():
    layers = inventories("cpu")
    mixed, expected = outputs(mix_inventories(*layers)), outputs(reference.mix_inventories(*layers))
    torch.testing.assert_close(mixed, expected, atol=1e-13, rtol=1e-13)
    small = [[torch.randn(2, 3, 2, 1, dtype=torch.float64)], [torch.randn(2, 3, 1, 3, dtype=torch.float64)],
             [torch.rand(4, 2, 3, dtype=torch.float64)]]  # fmt: skip
    require_grad(small)
    assert torch.autograd.gradcheck(
        lambda A, B, w: tuple(outputs(mix_inventories([A], [B], [w]))), tuple(t for (t,) in small)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_no_gradient_reaches_get_none(device, backend):
    layers = inventories(device, torch.float32)
    require_grad(layers)
    with linlora.use_backend(backend):
        mixed_As, mixed_Bs = mix_inventories(*layers)
    loss = mixed_As[0].sum() + mixed_Bs[2].sum()
    As, Bs, mixtures = (torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True) for tensors in layers)
    assert [gradient is None for gradient in (*As, *Bs)] == [False, True, True, True, True, False]
    assert [gradient is None for gradient in mixtures] == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inventories_weights_and_gradients(device, backend):
    As, Bs, mixtures = inventories(device, torch.float32)
    strided = (
        [A.mT.contiguous().mT for A in As],
        [B.mT.contiguous().mT for B in Bs],
        [w.transpose(0, 1).contiguous().transpose(0, 1) for w in mixtures],
    )
    leaves, expected_leaves = require_grad(strided), require_grad((As, Bs, mixtures))
    with linlora.use_backend(backend):
        mixed = outputs(mix_inventories(*strided))
    expected = outputs(reference.mix_inventories(As, Bs, mixtures))
    gradients = torch.autograd.grad(sum(factor.sum() for factor in mixed), leaves)  # expanded, stride 0
    wanted = torch.autograd.grad(sum(factor.sum() for factor in expected), expected_leaves)
    for actual, exact in zip((*mixed, *gradients), (*expected, *wanted), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-4, rtol=1e-4)


def test_triton_repeats_to_the_bit(device):
    layers = inventories(device, torch.float32)
    leaves = require_grad(layers)
    runs = []
    for _ in range(2):
        with linlora.use_backend("triton"):
            mixed = outputs(mix_inventories(*layers))
        runs.append([*mixed, *torch.autograd.grad(sum(factor.sin().sum() for factor in mixed), leaves)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_different_dtypes_and_no_layers_at_all(device, backend):
    As, Bs, mixtures = inventories(device, torch.float32)
    As[1], Bs[1] = As[1].half(), Bs[1].half()
    with linlora.use_backend(backend):
        mixed_As, mixed_Bs = mix_inventories(As, Bs, mixtures)
        assert mix_inventories([], [], []) == ([], [])
    expected_As, _ = reference.mix_inventories(*wide((As, Bs, mixtures)))
    for actual, expected in zip(mixed_As, expected_As, strict=True):
        assert relative_error(actual, expected) < 1e-6
    assert [factor.dtype for factor in mixed_Bs] == [torch.float32] * 3


def test_autocast_is_of_the_layers_not_of_what_is_mixed_for_them(device):
    lists = inventories(device, torch.float32)
    leaves = require_grad(lists)
    expected = outputs(mix_inventories(*lists))
    gradients = torch.autograd.grad(sum(t.sin().sum() for t in expected), leaves)
    with torch.autocast(device, torch.bfloat16):
        actual = outputs(mix_inventories(*lists))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(t.sin().sum() for t in actual), leaves), gradients)


def test_transforms_of_torch_func_and_compilation():
    layers = inventories("cpu")

    def mixed(mixtures, mix):
        return outputs(mix(layers[0], layers[1], mixtures))

    tangents = [torch.randn_like(w) for w in layers[2]]
    results = [
        torch.func.jvp(lambda w, mix=mix: mixed(w, mix), (layers[2],), (tangents,))
        for mix in (mix_inventories, reference.mix_inventories)
    ]
    torch.testing.assert_close(*results)
    compiled = torch.compile(lambda w: mixed(w, mix_inventories), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layers[2]), mixed(layers[2], reference.mix_inventories))


def test_double_backward_raises_instead_of_dropping_terms():
    layers = inventories("cpu")
    leaves = require_grad(layers)
    loss = outputs(mix_inventories(*layers))[0].square().sum()
    with pytest.raises(RuntimeError, match=r"mix_inventories.*create_graph"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


ONES = torch.ones
BAD = {
    "lengths": ([], [], [ONES(1, 1, 1)], "lists of one length are expected, got 0 As, 0 Bs and 1 mixtures"),
    "ranks": ([ONES(1, 2, 6, 2)], [ONES(1, 2, 3, 4)], [ONES(1, 1, 2)], "layer 0: .*differ in heads, skills or rank"),
    "skills": ([ONES(1, 2, 6, 3)], [ONES(1, 2, 3, 4)], [ONES(1, 1, 5)], r"layer 0: a mixture \(T, Q = 1, S = 2\)"),
    "mixture": ([None], [ONES(1, 2, 3, 4)], [ONES(1, 2)], r"layer 0: a mixture \(T, Q = 1, S = 2\)"),
    "dimensions": ([None], [ONES(2, 3, 4)], [ONES(1, 1, 2)], "layer 0: an inventory A"),
    "dtypes": ([ONES(1, 2, 6, 3).half()], [ONES(1, 2, 3, 4)], [ONES(1, 1, 2)], "layer 0: A is torch.float16, B torch"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_with_its_layer(name):
    *lists, message = BAD[name]
    with pytest.raises(ValueError, match=f"mix_inventories.*{message}"):
        mix_inventories(*lists)
