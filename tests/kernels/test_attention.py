"""Attention with tangents: both streams and the gradients of the primal, against softmax attention in float64."""

import itertools

import pytest
import torch
from kernel_oracles import assert_close
from linlora.kernels.attention_problem import Attention, AttentionResult
from linlora.kernels.configs import Config

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# For 20 queries and 40 keys: one block, or several, which takes the interpreter longer.
ONE_BLOCK = Config("online", 32, 64, 64, 64, 4, 2)
SMALL = Config("online", 16, 32, 64, 64, 4, 2)
CHUNKED = Config("online", 16, 32, 16, 16, 4, 2)
WIDE_DOTS = Config("online", 32, 16, 64, 16, 4, 2)  # products over the whole head size, outputs in chunks
NO_TANGENTS = (None, None, None)


def attention(*fields, config=None):
    """(o, o_tangent, lse) of a problem of these fields."""
    return kernels.attention(Attention(*fields), config)


def attention_backward(g, q, k, v, o, lse, *options, config=None):
    """(dq, dk, dv) of a problem without tangents."""
    problem = Attention(q, k, v, *NO_TANGENTS, *options)
    return kernels.attention_backward(problem, g, AttentionResult(o, None, lse), config)


def inputs(dtype, device, batch=1, heads=2, key_heads=1, queries=20, keys=40, size=24, value_size=None):
    """((q, k, v), (q_t, k_t, v_t))"""
    q_shape, k_shape = (batch, heads, queries, size), (batch, key_heads, keys, size)
    shapes = (q_shape, k_shape, (*k_shape[:3], size if value_size is None else value_size))
    return tuple(tuple(torch.randn(shape).to(device, dtype) for shape in shapes) for _ in range(2))


def softmax_attention(q, k, v, mask, causal, scale, kept):
    """(o, lse) in float64, as one would write them; a query that sees no key has P = 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    S = scale * q @ k.mT
    seen = torch.ones_like(S, dtype=torch.bool)
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    elif mask is not None:
        S = S + mask.double()
        seen = seen & (mask != -torch.inf)
    if causal:
        seen = seen.tril()
    S = S.masked_fill(~seen, -torch.inf)
    P = S.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1) * seen
    return (P * kept) @ v, S.logsumexp(-1)


def kept_share(q, k, dropout_p, seed):
    """keep / (1 - p), one mask over the rows (b H + h) Sq + i."""
    if dropout_p == 0.0:
        return 1.0
    shape = (*q.shape[:3], k.shape[2])
    return reference.keep_mask(q.shape[:3].numel(), k.shape[2], dropout_p, seed).view(shape).double() / (1 - dropout_p)


def check_streams(primals, tangents, mask=None, causal=False, scale=0.3, dropout_p=0.0, seed=None, config=ONE_BLOCK):
    """o, o_t and lse; returns o and lse."""
    q, k, _ = primals
    o, o_tangent, lse = attention(*primals, *tangents, mask, causal, scale, dropout_p, seed, config=config)
    kept = kept_share(q, k, dropout_p, seed)
    wide = tuple(x.double() for x in primals)
    directions = tuple(
        torch.zeros_like(x) if tangent is None else tangent.double() for x, tangent in zip(wide, tangents, strict=True)
    )
    (expected, expected_lse), (expected_tangent, _) = torch.func.jvp(
        lambda *x: softmax_attention(*x, mask, causal, scale, kept), wide, directions
    )
    assert o.dtype == q.dtype
    assert_close("o", o, expected)
    if tangents == NO_TANGENTS:
        assert o_tangent is None
    else:
        assert o_tangent.dtype == q.dtype
        assert_close("o_tangent", o_tangent, expected_tangent)
    assert lse.dtype is FP32
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert_close("lse", lse.nan_to_num(neginf=0.0), expected_lse.nan_to_num(neginf=0.0))
    return o, lse


def check(primals, tangents, mask=None, causal=False, scale=0.3, dropout_p=0.0, seed=None, config=ONE_BLOCK):
    """Both streams, then dq, dk and dv."""
    q, k, _ = primals
    options = (mask, causal, scale, dropout_p, seed)
    o, lse = check_streams(primals, tangents, *options, config)
    g = torch.randn(o.shape).to(o)
    gradients = attention_backward(g, *primals, o, lse, *options, config=config)
    wide = tuple(x.double().requires_grad_() for x in primals)
    expected, _ = softmax_attention(*wide, mask, causal, scale, kept_share(q, k, dropout_p, seed))
    for name, gradient, wanted in zip(
        ("dq", "dk", "dv"), gradients, torch.autograd.grad(expected, wide, g.double()), strict=True
    ):
        assert gradient.dtype == q.dtype
        assert_close(name, gradient, wanted)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(FP32, SMALL), (FP16, SMALL), (BF16, SMALL), (FP32, CHUNKED), (BF16, CHUNKED), (FP16, WIDE_DOTS)],
    ids=["fp32", "fp16", "bf16", "fp32-chunked", "bf16-chunked", "fp16-wide-dots"],
)
def test_matches_softmax_attention(device, dtype, config):
    check(*inputs(dtype, device), config=config)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3))[:-1], ids=str)
def test_every_subset_of_tangents(device, given):
    primals, tangents = inputs(FP32, device)
    tangents = tuple(tangent if is_given else None for tangent, is_given in zip(tangents, given, strict=True))
    check_streams(primals, tangents)


@pytest.mark.parametrize("size", [1, 5, 16, 33, 40, 64, 100])
def test_every_head_size(device, size):
    check(*inputs(FP32, device, size=size))


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_the_table_serves_the_widest_heads(device, dtype):
    check(*inputs(dtype, device, heads=1, queries=20, keys=20, size=256), scale=1 / 16, config=None)


@pytest.mark.parametrize("config", [SMALL, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize(("size", "value_size"), [(24, 40), (40, 8)])
def test_values_of_another_size(device, size, value_size, config):
    check(*inputs(FP32, device, size=size, value_size=value_size), causal=True, config=config)


@pytest.mark.parametrize(("batch", "heads", "key_heads"), [(2, 4, 2), (1, 4, 1), (1, 3, 3)])
def test_grouped_heads(device, batch, heads, key_heads):
    check(*inputs(FP32, device, batch=batch, heads=heads, key_heads=key_heads), causal=True, config=SMALL)


@pytest.mark.parametrize(("queries", "keys"), [(37, 50), (50, 37), (40, 40), (2, 33), (33, 2)])
def test_causal(device, queries, keys):
    check(*inputs(FP32, device, queries=queries, keys=keys), causal=True, config=SMALL)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of what the interpreter computes here
@pytest.mark.parametrize("config", [SMALL, WIDE_DOTS], ids=["16-queries", "32-queries"])
def test_causal_skips_the_blocks_it_masks(device, config):
    (q, k, v), tangents = inputs(FP32, device, keys=50, queries=50)
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.nan
    o, o_tangent, lse = attention(q, k, v, *tangents, None, True, 0.3, config=config)
    for output in (o, o_tangent, lse):
        assert output[:, :, :32].isfinite().all()


def random_mask(shape, kind, device):
    return torch.rand(shape, device=device) < 0.7 if kind == "bool" else torch.randn(shape, device=device)


MASKS = {
    "query-key": (20, 40),
    "key-padding": (2, 1, 1, 40),
    "head": (2, 20, 40),
    "batch": (2, 1, 20, 40),
    "query": (20, 1),
    "full": (2, 2, 20, 40),
}


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks_broadcast(device, shape, kind):
    check(*inputs(FP32, device, batch=2), mask=random_mask(shape, kind, device))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", [(20, 40), (1, 1, 1, 40)], ids=["query-key", "key-padding"])
def test_masks_combine_with_causality(device, shape, kind):
    check(*inputs(FP32, device), mask=random_mask(shape, kind, device), causal=True, config=SMALL)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_an_additive_mask_beside_other_activations(device, dtype):
    mask = torch.randn(20, 40, device=device).masked_fill(torch.rand(20, 40, device=device) < 0.3, -torch.inf)
    check(*inputs(FP16, device), mask=mask.to(dtype))


def test_an_expanded_mask_is_read_where_it_lies(device):
    mask = (torch.rand(40, 2, device=device) < 0.7).t()[:, None, None].expand(2, 2, 20, 40)
    assert mask.stride() == (1, 0, 0, 2)
    check(*inputs(FP32, device, batch=2), mask=mask)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of what the interpreter computes here
@pytest.mark.parametrize("kind", ["bool", "-inf", "least"])
def test_a_query_that_sees_no_key_gives_zeros(device, kind):
    primals, tangents = inputs(FP32, device)
    seen = torch.rand(20, 40, device=device) < 0.7
    seen[3], seen[16:] = False, False
    mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf)
    check_streams(primals, tangents, mask=mask, config=SMALL)
    mask = mask if kind != "least" else torch.where(seen, 0.0, torch.finfo(FP32).min)
    o, o_tangent, lse = attention(*primals, *tangents, mask, False, 0.3, config=SMALL)
    dq, dk, dv = attention_backward(torch.ones_like(o), *primals, o, lse, mask, False, 0.3, config=SMALL)
    assert (lse[:, :, 3] == -torch.inf).all()
    for output in (o, o_tangent, dq):
        assert not output[:, :, 3].any()
        assert not output[:, :, 16:].any()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_large_finite_masks_give_finite_gradients(device):
    primals, _ = inputs(FP32, device)
    mask = torch.full((20, 40), -1e9, device=device)
    o, _, lse = attention(*primals, *NO_TANGENTS, mask, False, 0.3, config=SMALL)
    for output in (o, lse, *attention_backward(o, *primals, o, lse, mask, False, 0.3, config=SMALL)):
        assert output.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_any_scale(device, scale):
    check(*inputs(FP32, device), scale=scale)


def test_large_scores(device):
    primals, tangents = inputs(FP32, device)
    check((10 * primals[0], *primals[1:]), tangents, scale=1.0, config=SMALL)


def test_what_all_keys_share_costs_the_tangent_no_precision(device):
    (q, k, v), tangents = inputs(BF16, device)
    k = k + 8 * torch.randn(k.shape[-1]).to(k)  # S_t is mostly the same for all of them
    check_streams((q, k, v), tangents, config=SMALL)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_batch_sequence_head_strides(device, dtype):
    primals, tangents = inputs(dtype, device, batch=2)
    turned = [tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in side) for side in (primals, tangents)]
    assert not turned[0][0].is_contiguous()
    check(*turned)


def test_arbitrary_strides(device):
    primals, tangents = inputs(FP32, device, batch=2)
    check(*(tuple(torch.stack([x.mT, x.mT], -1)[..., 0].mT for x in side) for side in (primals, tangents)))


def test_a_cotangent_without_memory_of_its_own(device):
    primals, _ = inputs(FP32, device)
    o, _, lse = attention(*primals, *NO_TANGENTS, None, False, 0.3, config=SMALL)
    options = (*primals, o, lse, None, False, 0.3)
    ones = torch.ones((), device=device).expand(o.shape)
    for one, other in zip(
        attention_backward(ones, *options, config=SMALL),
        attention_backward(ones.contiguous(), *options, config=SMALL),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "config"), [(FP32, SMALL), (FP16, CHUNKED)], ids=["whole", "chunked"])
def test_dropout(device, dtype, config):
    seed = torch.tensor(2**31 - 5, device=device)
    primals, tangents = inputs(dtype, device, batch=2)
    check(primals, tangents, causal=True, dropout_p=0.4, seed=seed, config=config)


def test_the_dropout_mask_is_the_references_bit_for_bit(device):
    batch, heads, queries, keys = 2, 2, 20, 50
    seed = torch.tensor(5, device=device)
    q = k = torch.zeros(batch, heads, keys, 1, device=device)
    identity = torch.eye(keys, device=device).expand(batch, heads, keys, keys)
    o, o_tangent, _ = attention(
        q[:, :, :queries], k, identity, None, None, identity, None, False, 1.0, 0.3, seed, config=SMALL
    )
    keep = reference.keep_mask(batch * heads * queries, keys, 0.3, seed).view(o.shape)
    assert torch.equal(o != 0, keep)
    assert torch.equal(o_tangent != 0, keep)
    _, _, dv = attention_backward(
        identity[:, :, :queries], q[:, :, :queries], k, identity, o, torch.zeros_like(o[..., 0]), None, False, 1.0,
        0.3, seed, config=SMALL,
    )  # fmt: skip
    assert torch.equal(dv[..., :queries] != 0, keep.mT)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_sides(device, empty):
    primals, tangents = inputs(FP32, device, **{empty: 0})
    o, o_tangent, lse = attention(*primals, *tangents, None, True, 0.3)
    gradients = attention_backward(o, *primals, o, lse, None, True, 0.3)
    assert o.shape == o_tangent.shape == primals[0].shape
    assert (lse == -torch.inf).all()
    for output in (o, o_tangent, *gradients):
        assert not output.any()
    for gradient, primal in zip(gradients, primals, strict=True):
        assert gradient.shape == primal.shape


def test_repeats_to_the_bit(device):
    primals, tangents = inputs(FP16, device)
    g = torch.randn_like(primals[0])

    def run():
        o, o_tangent, lse = attention(*primals, *tangents, None, True, 0.3, config=SMALL)
        return o, o_tangent, lse, *attention_backward(g, *primals, o, lse, None, True, 0.3, config=SMALL)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_refuses_what_does_not_fit(device):
    (q, k, v), (q_tangent, _, _) = inputs(FP32, device, key_heads=2)
    seen = torch.ones(20, 40, dtype=torch.bool, device=device)

    def refuses(message, *, primals=(q, k, v), tangent=None, mask=None, dropout_p=0.0, seed=None):
        with pytest.raises(ValueError, match=message):
            attention(*primals, tangent, None, None, mask, False, 0.3, dropout_p, seed)

    refuses(r"\(batch, heads, length, head size\) is expected, got q \(2, 20, 24\)", primals=(q[0], k, v))
    refuses(r"the head size of v is in 1..256, got 0", primals=(q, k, v[..., :0]))
    refuses(r"the heads of q are a multiple of those of k and v, got q \(1, 1, 20, 24\)", primals=(q[:, :1], k, v))
    refuses(r"do not fit together: .* k \(1, 2, 40, 23\)", primals=(q, k[..., 1:], v))
    refuses(r"do not fit together: .* v \(1, 2, 39, 24\)", primals=(q, k, v[:, :, 1:]))
    refuses(r"k is torch.float32 beside torch.float32 activations, got torch.float16", primals=(q, k.half(), v))
    refuses(r"q is fp32, fp16 or bf16, got torch.float64", primals=(q.double(), k, v))
    refuses(r"q_tangent is \(1, 2, 19, 24\), q is \(1, 2, 20, 24\)", tangent=q_tangent[:, :, 1:])
    refuses(r"mask \(40, 20\) does not broadcast to the scores \(1, 2, 20, 40\)", mask=seen.t())
    refuses(r"the mask is torch.int64: use bool", mask=seen.long())
    refuses(r"dropout needs a seed", dropout_p=0.1)
    o, _, lse = attention(q, k, v, *NO_TANGENTS, None, False, 0.3, config=SMALL)
    with pytest.raises(ValueError, match=r"g is \(1, 2, 20, 24\) here, got \(1, 2, 20, 23\)"):
        attention_backward(o[..., 1:], q, k, v, o, lse, None, False, 0.3)
    with pytest.raises(ValueError, match=r"lse is torch.float32 \(1, 2, 20\) on .*, got torch.float16"):
        attention_backward(o, q, k, v, o, lse.half(), None, False, 0.3)
