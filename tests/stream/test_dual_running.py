"""`dual` in the ways that networks are trained: checkpoints, accumulated gradients, averaged weights, compiled code.

Two processes are in tests/distributed.
"""

import copy

import pytest
import torch
from forward_oracle import DiT, dit_step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from linlora.functional import dual
from linlora.stream import DualTensor, TangentError


def gradients(net, inputs, tangents):
    u, u_tangent = dual(net, inputs, tangents)
    net.zero_grad()
    (u - u_tangent.detach()).square().mean().backward()
    return [u.detach(), u_tangent.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _selective():
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


OPTIONS = {"plain": {}, "selective": {"context_fn": _selective}, "without random states": {"preserve_rng_state": False}}


class Checkpointed(DiT):
    options: dict = {"use_reentrant": False}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.forward = self._checkpointed(block, block.forward)

    def _checkpointed(self, block, forward):
        return lambda x, condition: checkpoint(forward, x, condition, **self.options)


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_run_both_streams_again(name):
    net, inputs, tangents = dit_step()
    other = Checkpointed().double()
    other.load_state_dict(net.state_dict())
    other.options = {"use_reentrant": False, **OPTIONS[name]}
    assert_same(gradients(other, inputs, tangents), gradients(net, inputs, tangents))


def test_a_reentrant_checkpoint_is_refused():
    _, inputs, tangents = dit_step()
    net = Checkpointed().double()
    net.options = {"use_reentrant": True}
    with pytest.raises(TangentError, match="use_reentrant=False"):
        dual(net, inputs, tangents)


def test_a_module_that_raises_leaves_nothing_behind():
    net, inputs, tangents = dit_step()
    hook = net.out.register_forward_hook(lambda *_: 1 / 0)
    net.blocks[0].register_forward_hook(lambda module, args, output: setattr(module, "last", output))
    with pytest.raises(ZeroDivisionError):
        dual(net, inputs, tangents)
    assert not isinstance(net.blocks[0].last, DualTensor)
    hook.remove()
    assert_same(dual(net, inputs, tangents)[:1], [net(*inputs)])


def test_gradients_accumulate():
    net, inputs, tangents = dit_step(batch=4)
    whole = gradients(net, inputs, tangents)[2:]
    net.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        u, u_tangent = dual(net, tuple(x[part] for x in inputs), tuple(x if x is None else x[part] for x in tangents))
        ((u - u_tangent.detach()).square().mean() / 2).backward()
    assert_same([p.grad for p in net.parameters()], whole)


def test_averaged_weights_are_taken_without_a_graph():
    net, inputs, tangents = dit_step()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(net)
    with torch.no_grad():
        actual = dual(average, inputs, tangents)
    assert not any(y.requires_grad for y in actual)
    assert_same(actual, [y.detach() for y in dual(net, inputs, tangents)])
    average.update_parameters(net)  # which copies the module: there is nothing in it that cannot be


@pytest.mark.parametrize("what", ["the network", "in place", "a block"])
def test_compiled_modules_run_eagerly_and_say_so(what):
    net, inputs, tangents = dit_step()
    expected = gradients(net, inputs, tangents)
    other = copy.deepcopy(net)
    if what == "the network":
        other = torch.compile(other, backend="eager")
    elif what == "in place":
        other.compile(backend="eager")
    else:
        other.blocks[0] = torch.compile(other.blocks[0], backend="eager")
    with pytest.warns(UserWarning, match="is compiled, but runs eagerly here"):
        actual = gradients(other, inputs, tangents)
    assert_same(actual, expected)


def test_a_compiled_step_breaks_its_graph_around_dual_and_says_why():
    net, inputs, tangents = dit_step()

    def step(z, r, t, label):
        u, u_tangent = dual(net, (z * 1.0, r, t, label), tangents)
        return u * 2.0, u_tangent.detach() * 2.0

    actual = torch.compile(step, backend="eager")(*inputs)
    assert_same(actual, [2.0 * y.detach() for y in dual(net, inputs, tangents)])
    torch.compiler.reset()
    with pytest.raises(Exception, match="dual runs eagerly: both streams flow"):
        torch.compile(step, backend="eager", fullgraph=True)(*inputs)


def test_compiled_functions_inside_run_eagerly():
    net = nn.Linear(4, 4).double()
    function = torch.compile(lambda x: net(x).sin(), backend="eager")
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: net(x).sin(), (x,), (v,))
    assert_same(dual(lambda x: function(x), (x,), (v,)), expected)
