"""Every configuration compiles for its architectures without spills, in the shared memory they have: each kernel in its
widest variant. `make aot` compiles all variants.

A process that interprets kernels cannot compile them, hence the subprocess.
"""

import json
import os
import subprocess
import sys

import pytest
from linlora.kernels import aot_cases

ATTENTION = ("attention", "attention_backward")
LAYERS = ("lora_linear", "linearized_lora_linear", "factor_gradients", "linear")
OTHERS = tuple(op for op in aot_cases.OPS if op not in (*ATTENTION, *LAYERS))


@pytest.mark.parametrize("ops", [ATTENTION, LAYERS, OTHERS], ids=lambda ops: ops[0])  # a process each
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_table_compiles_ahead_of_time(tmp_path, architecture, ops):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "linlora.kernels.aot", "--widest"]
    done = subprocess.run(
        [*command, "--arch", str(architecture), *(f"--op={op}" for op in ops), "--json", str(report)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, "what Triton warns of here, it tells every user: " + done.stderr
    results = json.loads(report.read_text())
    assert results
    assert not [result["case"] for result in results if result["failures"] or result["registers"] == 0]
