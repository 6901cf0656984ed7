"""Runs the tests by every instruction set that torch has on this machine, with several seeds of what is random.

    python tests/everywhere.py --seeds 0 1 -- tests/routing -x

One line of result for each run, below it the tests that failed. Seed 0 is that of `make test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = ("default", "avx2", "avx512", "vsx", "zvector", "sve256")
"""Values of ATEN_CPU_CAPABILITY; torch takes another where the machine has not the one that is asked for."""


def of_this_machine() -> list[str]:
    """Those values that torch takes."""
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    taken = {}
    for name in INSTRUCTION_SETS:
        done = subprocess.run(ask, env=os.environ | {"ATEN_CPU_CAPABILITY": name}, capture_output=True, text=True)
        taken.setdefault(done.stdout.strip(), name)
    return list(taken.values())


def run(instructions: str, seed: int, arguments: list[str]) -> bool:
    """Whether all tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-n", "auto", *arguments]
    if seed:
        command += [f"--seed={seed}", f"--hypothesis-seed={seed}"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    print(f"{instructions}, seed {seed}: {lines[-1].strip('= ')}", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("arguments", nargs="*", help="of pytest: which tests, and options")
    chosen = parser.parse_args()
    sets = of_this_machine()
    print(f"{', '.join(sets)}: {len(sets) * len(chosen.seeds)} runs", flush=True)
    passed = [run(name, seed, chosen.arguments) for seed in chosen.seeds for name in sets]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
