"""One of two processes that take `dual` of a wrapped network; each asserts that it is that of one process.

torchrun --nproc-per-node 2 tests/distributed/dual_worker.py
"""

import contextlib
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "stream"))
from forward_oracle import Block, dit_step

from linlora.functional import dual
from linlora.stream import DualTensor

STEPS = 2
WIDE = MixedPrecisionPolicy()
WRAPPED = {
    "ddp": {},
    "ddp, unused parameters": {"find_unused_parameters": True},
    "ddp, static graph": {"static_graph": True},
    "ddp, in a closure": {},
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, (net, inputs, tangents) = dist.get_rank(), dit_step(batch=4)
    part = slice(2 * rank, 2 * rank + 2)
    mine = [tuple(x if x is None else x[part] for x in tree) for tree in (inputs, tangents)]
    expected = train(copy.deepcopy(net), inputs, tangents)
    for name, options in WRAPPED.items():
        one = copy.deepcopy(net)
        if options.get("find_unused_parameters"):
            one.unused = torch.nn.Linear(1, 1).double()
        wrapped = DistributedDataParallel(one, **options)
        call = (lambda *x, wrapped=wrapped: wrapped(*x)) if "closure" in name else wrapped
        same(name, train(one, *mine, call), expected)
        assert not wrapped._forward_pre_hooks
        assert not one._forward_hooks
    for name in ("fsdp", "fsdp, checkpointed"):
        one = copy.deepcopy(net)
        if "checkpointed" in name:
            apply_activation_checkpointing(one, check_fn=lambda module: isinstance(module, Block))
        same(name, train(sharded(one), *mine), expected)
    mixed(net, mine, inputs, tangents)
    accumulated(net, inputs, tangents, rank)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # what FSDP2 caches keeps the group alive, and gloo's threads with it


def train(net, inputs, tangents, call=None):
    """The weights after a few steps of a loss of both outputs."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        u, u_tangent = dual(call or net, inputs, tangents)
        assert not isinstance(u, DualTensor)
        (u - u_tangent.detach()).square().mean().backward()
        optimizer.step()
    return {name: whole(p) for name, p in net.named_parameters() if "unused" not in name}


def sharded(net, inner=WIDE, outer=WIDE):
    for block in net.blocks:
        fully_shard(block, mp_policy=inner)
    return fully_shard(net, mp_policy=outer)


def mixed(net, mine, inputs, tangents):
    """Weights and inputs of every module in float32, in a network of float64."""
    narrow = torch.float32, torch.float32
    policies = MixedPrecisionPolicy(*narrow), MixedPrecisionPolicy(*narrow, torch.float64)
    one = sharded(copy.deepcopy(net), *policies)
    outputs = dual(one, *mine)
    torch.testing.assert_close(outputs, dual(net, *mine), rtol=1e-4, atol=1e-4)
    (outputs[0] - outputs[1].detach()).square().mean().backward()
    net = copy.deepcopy(net)
    u, u_tangent = dual(net, inputs, tangents)
    (u - u_tangent.detach()).square().mean().backward()
    for a, b in zip(one.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad, rtol=1e-3, atol=1e-4)


def accumulated(net, inputs, tangents, rank):
    """Two backward passes of which the first does not reduce."""
    wrapped = DistributedDataParallel(copy.deepcopy(net))
    for n, around in enumerate((wrapped.no_sync, contextlib.nullcontext)):
        part = slice(2 * rank + n, 2 * rank + n + 1)
        with around():
            u, u_tangent = dual(wrapped, *(tuple(x if x is None else x[part] for x in t) for t in (inputs, tangents)))
            ((u - u_tangent.detach()).square().mean() / 2).backward()
    u, u_tangent = dual(net, inputs, tangents)
    (u - u_tangent.detach()).square().mean().backward()
    for a, b in zip(wrapped.module.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def same(name, actual, expected):
    actual = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in actual.items()}
    assert actual.keys() == expected.keys(), name
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {key}")


if __name__ == "__main__":
    main()
