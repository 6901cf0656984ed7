"""`dual` of networks in DDP and FSDP2, in two processes (gloo, CPU), has the gradients of one process."""

import os
import subprocess
import sys
from pathlib import Path


def test_wrapped_networks_train_as_in_one_process(patience):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).with_name("dual_worker.py")),
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr[-6000:]
