"""What each of the processes does that `torchrun` starts; `results.json` and the files beside it are what they found.

    torchrun --nproc-per-node 2 tests/distributed/worker.py DIRECTORY

A check that fails raises, and torchrun ends them all.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from workload import CASES, ROWS, STEPS, batches, linearized, logged_losses, optimizer_of, step, trainer_of

import linlora
from linlora.testing import tiny_model

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        "losses": losses(directory),
        "mixed precision": mixed_precision(),
        "checkpointing": checkpointing(),
        "resumed": resumed(directory),
        "exported": exported(directory),
        "applied": applied(),
        "refused": refused(),
        "trainer": trainer(directory),
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, results)
    if dist.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(every))
    dist.barrier()
    dist.destroy_process_group()
    leave()


def leave() -> None:
    """End the process without finalizing the interpreter.

    What FSDP2 caches keeps the group alive, and with it gloo's threads. One that lets go of a tensor while the
    interpreter is being torn down aborts the process, after all its work is done (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def losses(directory: Path) -> dict[str, list[float]]:
    """Every case under DDP and under FSDP2; rank 0 keeps the trained vectors."""
    found = {}
    for name, case in CASES.items():
        for kind in ("ddp", "fsdp"):
            model = linearized(*case)
            wrapped = DistributedDataParallel(model) if kind == "ddp" else sharded(model)
            found[f"{kind}-{name}"] = train(wrapped, case[0])
            keep(linlora.TaskVector.from_model(model), directory / f"{kind}-{name}.safetensors")
    return found


def mixed_precision() -> dict[str, Any]:
    """FSDP2 gathers in bfloat16: what the layers then compute in, and the loss."""
    found = {}
    for scope in ("layer", "model"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(linearized("llama", scope, "trained"), mp_policy=policy)
        loss = train(model, "llama", range(1))
        gradients = {str(p.grad.dtype) for p in model.parameters() if p.requires_grad}
        found[scope] = {"losses": loss, "gradients": sorted(gradients)}
    return found


def checkpointing() -> dict[str, list[float]]:
    found = {}
    for scope in ("layer", "model"):
        model = linearized("llama", scope, "trained").train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        found[scope] = train(sharded(model), "llama")
    return found


def resumed(directory: Path) -> dict[str, list[float]]:
    """Two steps in one way, all state handed over whole, and the remaining steps in another way."""
    found = {}
    for scope in ("layer", "model"):
        first, second = linearized("bert", scope, "trained"), linearized("bert", scope, "trained")
        sharded(first)
        optimizer = optimizer_of(first)
        train(first, "bert", range(2), optimizer)
        state = get_state_dict(first, optimizer, options=WHOLE)
        if dist.get_rank() == 0:
            torch.save(state, directory / f"fsdp-state-{scope}.pt")
        everywhere = [state]
        dist.broadcast_object_list(everywhere)  # rank 0 alone holds it
        for kind, wrap in (("ddp", DistributedDataParallel), ("fsdp", sharded)):
            model = wrap(second if kind == "ddp" else linearized("bert", scope, "trained"))
            optimizer = optimizer_of(model)
            of_model, of_optimizer = copy.deepcopy(everywhere[0])  # DDP's own names are put into it
            set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=WHOLE)
            found[f"fsdp to {kind}, {scope}"] = train(model, "bert", range(2, STEPS), optimizer)
    return found


def exported(directory: Path) -> dict[str, Any]:
    """Every rank exports into a folder of its own: which of them there are. Then the same by PEFT's own call."""
    found = {}
    for start in ("zero", "trained"):
        model = sharded(linearized("bert", "layer", start))
        train(model, "bert")
        linlora.export(model, directory / f"exported-{start}-by-{dist.get_rank()}")
        found[start] = logits(model)
        dist.barrier()
    return {"folders": sorted(path.name for path in directory.glob("exported-*")), "logits": found}


def applied() -> dict[str, Any]:
    """A vector trained by DDP set in a sharded model."""
    found = {}
    for scope in ("layer", "model"):
        model, target = linearized("bert", scope, "trained"), sharded(linearized("bert", scope, "trained"))
        train(DistributedDataParallel(model), "bert")
        linlora.apply(target, linlora.TaskVector.from_model(model))
        found[scope] = [logits(model), logits(target)]
    return found


def refused() -> dict[str, str]:
    plain, model = sharded(tiny_model("bert")), sharded(linearized("bert", "layer", "zero"))
    return {
        "linearize": error_of(lambda: linlora.linearize(plain)),
        "delinearize": error_of(lambda: linlora.delinearize(model)),
        "merge": error_of(lambda: linlora.merge(model)),
    }


def trainer(directory: Path) -> dict[str, list[float]]:
    found = {}
    for scope in ("layer", "model"):
        run = trainer_of(scope, str(directory / f"trainer-{scope}"), 8)
        with contextlib.redirect_stdout(io.StringIO()):
            run.train()
        found[scope] = logged_losses(run)
        keep(linlora.TaskVector.from_model(run.model), directory / f"trainer-{scope}.safetensors")
    return found


def sharded(model: PeftModel, **options: Any) -> PeftModel:
    """The model under FSDP2: every block by itself, the rest with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model()
    for block in base.bert.encoder.layer if hasattr(base, "bert") else base.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(
    model: nn.Module, architecture: str, steps: range = range(STEPS), optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Each rank takes its rows of every batch; the losses are those of the whole batches."""
    optimizer = optimizer or optimizer_of(model)
    found = []
    for batch in batches(architecture, steps):
        loss = step(model, optimizer, {name: mine(rows) for name, rows in batch.items()})
        dist.all_reduce(loss)
        found.append(loss.item() / dist.get_world_size())
    return found


def mine(rows: Tensor) -> Tensor:
    share = ROWS // dist.get_world_size()
    return rows[dist.get_rank() * share :][:share]


@torch.no_grad()
def logits(model: nn.Module) -> list:
    batch = next(batches("bert"))
    return model(input_ids=batch["input_ids"]).logits.tolist()


def keep(vector: linlora.TaskVector, path: Path) -> None:
    if dist.get_rank() == 0:
        vector.save(path)


def error_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
