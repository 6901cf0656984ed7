"""Attention of packed sequences is that of each of them alone."""

import pytest
import torch
from torch.nn import functional as F

from linlora.functional import packed_attention

D = torch.float64
CASES = {
    "one": ([5], None, {}),
    "three": ([3, 1, 4], None, {}),
    "causal": ([3, 1, 4], None, {"causal": True}),
    "empty ones": ([0, 3, 0], None, {}),
    "other keys": ([3, 2], [1, 5], {"scale": 0.3}),
    "no keys": ([3, 2], [0, 2], {}),
    "none": ([], None, {}),
}


def alone(q, k, v, lengths, key_lengths, causal=False, scale=None):
    outputs, split = [], [x.split(list(n)) for x, n in ((q, lengths), (k, key_lengths), (v, key_lengths))]
    for a, b, c in zip(*split, strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in (a, b, c))
        o = F.scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale, enable_gqa=True)
        outputs.append(o.nan_to_num()[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else q.new_empty(0, q.shape[1], v.shape[2])


@pytest.mark.parametrize("name", CASES)
def test_each_sequence_is_as_alone(name):
    lengths, key_lengths, options = CASES[name]
    rows, keys = sum(lengths), sum(lengths if key_lengths is None else key_lengths)
    shapes = (rows, 4, 8), (keys, 2, 8), (keys, 2, 5)
    primals = [torch.randn(*shape, dtype=D, requires_grad=True) for shape in shapes]
    tangents = [torch.randn(*shape, dtype=D, requires_grad=True) for shape in shapes]
    actual = packed_attention(*primals, *tangents, lengths=lengths, key_lengths=key_lengths, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.jvp(
            lambda *x: alone(*x, lengths, lengths if key_lengths is None else key_lengths, **options),
            tuple(primals),
            tuple(tangents),
        )
    cotangents = [torch.randn_like(o) for o in expected]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if rows == 0:
        return
    gradients = [torch.autograd.grad(o, [*primals, *tangents], cotangents) for o in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_dropout_of_each_sequence_is_its_own():
    q, k = torch.zeros(2, 16, 1, 4, dtype=D)
    v = torch.eye(8, dtype=D).repeat(2, 1).view(16, 1, 8)
    seed = torch.tensor(3)
    o, o_tangent = packed_attention(q, k, v, v_tangent=2.0 * v, lengths=[8, 8], dropout_p=0.5, seed=seed)
    torch.testing.assert_close(o_tangent, 2.0 * o)
    assert not torch.equal(o[:8], o[8:])
    assert 0 < (o == 0).sum() < o.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2, 2]}, "add up to 4, but q has 5"),
        ({"key_lengths": [1, 3]}, "add up to 4, but k has 5"),
        ({"key_lengths": [5]}, "do not fit together"),
        ({"lengths": [6, -1]}, "do not fit together"),
        ({"q": torch.zeros(1, 5, 2, 8)}, "tokens of all sequences, heads, head size"),
        ({"q_tangent": torch.zeros(4, 2, 8)}, "q_tangent is"),
        ({"k": torch.zeros(5, 2, 8, dtype=D)}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"lengths": [2, 3], **dict.fromkeys("qkv", torch.zeros(5, 2, 8)), **change}
    with pytest.raises(ValueError, match=message):
        packed_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
