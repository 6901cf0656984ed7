"""Arguments that a rule does not know, as a later PyTorch may add them: honoured, or refused. None is dropped."""

import pytest
import torch
from function_table import REFUSED, TABLE, D
from test_rules import FALLBACK, ONE
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from linlora.stream import DualTensor, Stream, TangentError, fused, structural
from linlora.stream.caller import function_name
from linlora.stream.forward import ForwardStream, refuse_grad
from linlora.stream.tensor import differentiable

FACTOR = 0.5
PROPERTIES = {"T", "mT", "data"}
CALLS = [((3, 4, 6), *call) for call in {**ONE, **FALLBACK}.items() if call[0] != "packed attention"]
CALLS += [((3, 4), *call) for call in TABLE.items() if call[0] not in REFUSED]
WITHOUT_TANGENT = {
    *(structural.metadata, structural.value, structural.constant, structural.iterate),
    *(structural.deep_copy, structural.type_of, fused.loss, fused.loss_of_probabilities, refuse_grad),
}
UNSEEN = {"grouped_product", "grid_sample", "set_item", "forward_mode", "packed"}  # which no call here has


class Later:
    """A function of a later PyTorch, whose results `of_tomorrow` multiplies. To tables it is today's."""

    def __init__(self, today):
        self.today, self.__name__ = today, today.__name__

    def __hash__(self):
        return hash(self.today)

    def __eq__(self, other):
        return self.today == other

    def __call__(self, /, *args, of_tomorrow=1.0, **kwargs):
        result = self.today(*args, **kwargs)
        if self.__name__.endswith("_") and not self.__name__.endswith("__"):
            return result.mul_(of_tomorrow)
        return tree_map(lambda y: y * of_tomorrow if differentiable(y) else y, result)


class Tomorrow(TorchFunctionMode):
    """Gives every function that has a rule the argument of a later PyTorch; `met` are the rules."""

    def __init__(self, rules):
        super().__init__()
        self.rules, self.met = rules, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, rule = kwargs or {}, self.rules.get(func)
        if rule is None or rule in WITHOUT_TANGENT or function_name(func) in {"__setitem__", *PROPERTIES}:
            return func(*args, **kwargs)
        self.met.add(rule)
        kwargs["of_tomorrow"] = FACTOR
        if DualTensor in types:
            return DualTensor.__torch_function__(Later(func), types, args, kwargs)
        return Later(func)(*args, **kwargs)


def running():
    stream = ForwardStream()
    stream.running = True
    return stream


def pairs(tree):
    """(primal, tangent) of every tensor of numbers; the tangent is zero where there is none."""
    for y in tree_leaves(tree):
        if isinstance(y, Tensor) and differentiable(y):
            primal, tangent = (y.primal, y.tangent) if isinstance(y, DualTensor) else forward_ad.unpack_dual(y)
            yield primal, torch.zeros_like(primal) if tangent is None else tangent


def inputs(shape):
    torch.manual_seed(0)
    return torch.rand(2, *shape, dtype=D)


@pytest.mark.parametrize("kind", [Stream, running])
def test_no_rule_drops_an_argument(kind):
    tomorrow, honoured = Tomorrow({**DualTensor.rules, **kind().rules}), 0
    for shape, name, function in CALLS:
        dual = DualTensor(*inputs(shape), kind())
        try:
            with tomorrow:
                actual = function(dual)
        except (TypeError, TangentError):  # PyTorch's own, or ours
            continue
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            x, x_tangent = inputs(shape)
            dual = forward_ad.make_dual(x.clone(), x_tangent)
            with tomorrow:
                expected = function(dual)
            expected = list(pairs(expected))
        for y, wanted in zip(pairs(actual), expected, strict=True):
            torch.testing.assert_close(y, wanted, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        honoured += 1
    assert honoured > 0.9 * len(CALLS)
    names = {rule.__name__ for rule in {*tomorrow.rules.values()} - WITHOUT_TANGENT}
    assert names - {rule.__name__ for rule in tomorrow.met} <= UNSEEN


def test_packed_attention_refuses_an_argument_that_its_rule_does_not_know():
    q = DualTensor(*torch.rand(2, 4, 2, 3, dtype=D), Stream())
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TangentError, match=r"_varlen_attn.*custom operator"):
        DualTensor.__torch_function__(
            torch.ops.torch_attn._varlen_attn.default, (), (q, q, q, starts, starts, 4, 4), {"softcap": 30.0}
        )
