"""Every configuration compiles for its architectures without spills, in the shared memory they have.

A process that interprets kernels cannot compile them, hence the subprocess.
"""

import json
import os
import subprocess
import sys

import pytest

OPS = [
    "linearized_lora_linear",
    "lora_linear",
    "factor_gradients",
    "linear",
    "norm",
    "activation",
    "attention",
    "attention_backward",
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_table_compiles_ahead_of_time(tmp_path, architecture, op):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "linlora.kernels.aot"]
    done = subprocess.run(
        [*command, "--arch", str(architecture), "--op", op, "--json", str(report)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())
    assert results
    assert not [result["case"] for result in results if result["failures"] or result["registers"] == 0]
