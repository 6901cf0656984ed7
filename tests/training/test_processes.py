"""`linlora train` in two processes of torchrun."""

import os
import subprocess
import sys

import torch

from linlora.testing import relative_error
from linlora.training import Run, train


def test_two_processes_train_what_one_does_and_write_it_once(settings, tmp_path, patience):
    training = {"max_steps": 2, "use_cpu": True}
    alone = train(settings("causal", training=training))
    together = settings("causal", out=str(tmp_path / "two"), training={**training, "per_device_train_batch_size": 4})
    together.to_yaml(tmp_path / "two.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "linlora.cli", "train", str(tmp_path / "two.yaml")]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1 of 2, loss") == 1
    run = Run.open(tmp_path / "two")
    assert run.metrics["environment"]["processes"] == 2
    assert run.metrics["test"]["rows"] == alone.metrics["test"]["rows"]
    one, two = (torch.cat([delta.flatten() for delta in r.vector.deltas.values()]) for r in (alone, run))
    assert relative_error(two, one) < 1e-5
