"""What a function does beside its result happens once: statistics, arguments, random states end as after one call."""

import pytest
import torch
from torch.nn import functional as F

import linlora
from linlora.stream import DualTensor, Stream, TangentError
from linlora.testing import tiny_batch, tiny_model

FUNCTIONS = {
    "batch norm": lambda x, mean, var, g: F.batch_norm(x, mean, var, training=True),
    "torch.batch_norm": lambda x, mean, var, g: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False),
    "instance norm": lambda x, mean, var, g: F.instance_norm(x[None].mT, mean[:4], var[:4]),
    "feature dropout": lambda x, mean, var, g: F.dropout1d(x, 0.5),
    "alpha dropout": lambda x, mean, var, g: F.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x, mean, var, g: F.rrelu(x, training=True),
    "gumbel softmax": lambda x, mean, var, g: F.gumbel_softmax(x),
    "a generator of one's own": lambda x, mean, var, g: torch.normal(x, 1.0, generator=g),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_side_effects_happen_once(name):
    x = torch.randn(6, 4)
    after = []
    for argument in (x, DualTensor(x, torch.randn(6, 4), Stream())):
        torch.manual_seed(0)
        mean, var, generator = torch.zeros(4), torch.ones(4), torch.Generator().manual_seed(1)
        y = FUNCTIONS[name](argument, mean, var, generator)
        y = y.primal if isinstance(y, DualTensor) else y
        after.append((y, mean, var, torch.get_rng_state(), generator.get_state()))
    for plain, dual in zip(*after, strict=True):
        assert torch.equal(plain, dual)


def test_a_function_that_writes_an_argument_is_refused():
    x = DualTensor(torch.randn(3, 4), torch.randn(3, 4), Stream())
    with pytest.raises(TangentError, match="writes one of its arguments"):
        F.embedding(torch.tensor([0, 1]), x, max_norm=0.1)


def test_the_hooks_of_a_fused_module_run_once_a_call_and_not_at_linearize():
    model, calls = tiny_model("llama", trained=True), []
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, output: calls.append(output.detach() * 1))
    norm.register_forward_pre_hook(lambda module, args: calls.append(args[0].detach() * 1))
    report = linlora.linearize(model, scope="model")
    assert "model.norm" in str(report) or type(norm).__mro__[1].__name__ == "WholeRMSNorm"
    assert not calls
    model(**tiny_batch("llama"))
    assert len(calls) == 2
