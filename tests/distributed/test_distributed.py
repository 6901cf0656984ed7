"""Two processes (gloo, CPU) started by torchrun train a linearized model as one process does: DDP, FSDP2, HF Trainer.

One launch does all that is asked here (worker.py); the tests compare it with training in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import set_state_dict

import linlora
from linlora import TaskVector
from linlora.testing import tiny_base

sys.path.insert(0, str(Path(__file__).parent))
from workload import CASES, STEPS, batches, linearized, logged_losses, optimizer_of, step, trainer_of

SCOPES = ("layer", "model")


@pytest.fixture(scope="session")
def launched(tmp_path_factory, patience):
    """(directory, what rank 0 found); both ranks find the same."""
    directory = tmp_path_factory.mktemp("distributed")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).with_name("worker.py")), str(directory),
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = json.loads((directory / "results.json").read_text())
    assert first == second
    return directory, first


def train(model, architecture, steps=range(STEPS), optimizer=None):
    optimizer = optimizer or optimizer_of(model)
    return [step(model, optimizer, batch).item() for batch in batches(architecture, steps)]


@pytest.fixture(scope="module")
def alone():
    """(losses, trained vector) of every case in one process."""
    found = {}
    for name, case in CASES.items():
        model = linearized(*case)
        found[name] = train(model, case[0]), TaskVector.from_model(model)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_and_trained_vector_are_those_of_one_process(launched, alone, kind, case):
    directory, found = launched
    losses, vector = alone[case]
    np.testing.assert_allclose(found["losses"][f"{kind}-{case}"], losses, rtol=2e-6)
    together = TaskVector.load(directory / f"{kind}-{case}.safetensors")
    assert (together - vector).norm() < 1e-4 * vector.norm()  # Adam amplifies the rounding of tiny gradients


@pytest.mark.parametrize("scope", SCOPES)
def test_fsdp_with_gradient_checkpointing_has_the_same_losses(launched, alone, scope):
    np.testing.assert_allclose(launched[1]["checkpointing"][scope], alone[f"llama-{scope}-trained"][0], rtol=2e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_fsdp_gathering_in_bfloat16_trains_with_float32_gradients(launched, alone, scope):
    found = launched[1]["mixed precision"][scope]
    assert found["gradients"] == ["torch.float32"]
    assert found["losses"][0] != alone[f"llama-{scope}-trained"][0][0]
    np.testing.assert_allclose(found["losses"], alone[f"llama-{scope}-trained"][0][:1], rtol=1e-2)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_begun_under_fsdp_is_finished_under_ddp_and_fsdp(launched, alone, kind, scope):
    losses = launched[1]["resumed"][f"fsdp to {kind}, {scope}"]
    np.testing.assert_allclose(losses, alone[f"bert-{scope}-trained"][0][2:], rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_training_begun_under_fsdp_is_finished_in_one_process(launched, alone, scope):
    of_model, of_optimizer = torch.load(launched[0] / f"fsdp-state-{scope}.pt", weights_only=True)
    model = linearized("bert", scope, "trained")
    optimizer = optimizer_of(model)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    losses = train(model, "bert", range(2, STEPS), optimizer)
    np.testing.assert_allclose(losses, alone[f"bert-{scope}-trained"][0][2:], rtol=1e-5)


def test_rank_0_alone_writes_the_adapter_of_a_sharded_model(launched):
    assert launched[1]["exported"]["folders"] == ["exported-trained-by-0", "exported-zero-by-0"]


@torch.no_grad()
@pytest.mark.parametrize("start", ["zero", "trained"])
def test_stock_peft_loads_what_a_sharded_model_exported_with_the_same_logits(launched, start):
    directory, found = launched
    stock = peft.PeftModel.from_pretrained(tiny_base("bert"), directory / f"exported-{start}-by-0").eval()
    logits = stock(input_ids=next(batches("bert"))["input_ids"]).logits
    torch.testing.assert_close(logits, torch.tensor(found["exported"]["logits"][start]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("start", ["zero", "trained"])
def test_the_vector_exported_by_a_sharded_model_is_applied_in_one_process(launched, start):
    directory, found = launched
    model = linearized("bert", "layer", start)
    linlora.apply(model, TaskVector.load(directory / f"exported-{start}-by-0" / "task_vector.safetensors"))
    logits = model(input_ids=next(batches("bert"))["input_ids"]).logits
    torch.testing.assert_close(logits, torch.tensor(found["exported"]["logits"][start]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_vector_is_applied_to_a_sharded_model(launched, scope):
    whole, sharded = launched[1]["applied"][scope]
    np.testing.assert_allclose(sharded, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("action", "remedy"),
    [("linearize", "before fully_shard"), ("delinearize", "linlora.export"), ("merge", "in one process")],
)
def test_what_replaces_parameters_is_refused_on_a_sharded_model(launched, action, remedy):
    message = launched[1]["refused"][action]
    assert action in message
    assert "sharded (FSDP2)" in message
    assert remedy in message


@pytest.mark.parametrize("scope", SCOPES)
def test_hf_trainer_in_two_processes_trains_and_saves_as_in_one(launched, tmp_path, scope):
    directory, found = launched
    whole = trainer_of(scope, str(tmp_path), 16)
    whole.train()
    np.testing.assert_allclose(found["trainer"][scope], logged_losses(whole), rtol=1e-5)
    vector = TaskVector.from_model(whole.model)
    together = TaskVector.load(directory / f"trainer-{scope}.safetensors")
    assert (together - vector).norm() < 1e-4 * vector.norm()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        theirs, ours = (
            saved_vector(folder / checkpoint, scope) for folder in (directory / f"trainer-{scope}", tmp_path)
        )
        assert ours.norm() > 0
        assert (theirs - ours).norm() < 1e-4 * ours.norm()


def saved_vector(checkpoint, scope):
    """The vector of a Trainer's checkpoint, loaded by PEFT into a linearized model."""
    model = linearized("bert", scope, "trained")
    peft.set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    return TaskVector.from_model(model)
