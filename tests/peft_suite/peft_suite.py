"""Runs PEFT's own tests on stock and on accelerated LoRA models and says what differs: `make peft-suite PEFT=CHECKOUT`.

    python tests/peft_suite/peft_suite.py CHECKOUT [FILE ...]

CHECKOUT is a source tree of the installed version of PEFT (its tests are not in the wheel: `pip download --no-deps
--no-binary :all: peft==VERSION`); FILEs are of its tests/, FILES below where none is named. Tests that do not pass on
stock models, of the hub for instance, and those of WIDER are not counted. Exit status 1 where one passes on stock
models alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = ("test_custom_models.py", "test_lorafa.py", "test_loraplus.py", "test_helpers.py")
WIDER = {"test_mixed_adapter_batches_training_mode_raises": "converted layers train several adapters in one batch"}
"""Tests that a call is refused, which linlora answers on purpose, and why."""
HERE = Path(__file__).resolve().parent


def run(checkout: Path, files: list[str], mode: str) -> dict[str, bool]:
    """Whether each test passed, by its name; skipped ones are left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        (Path(folder) / "tests" / "__init__.py").touch()  # not in source distributions
        command = [
            sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "accelerated", "--tb=no",
            "-p", "no:cacheprovider", "-p", "no:warnings", "--junitxml", str(report),
            *(f"tests/{name}" for name in files),
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "LINLORA_PEFT_SUITE": mode, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        print(f"{mode}: {' | '.join(done.stdout.strip().splitlines()[-2:])}", flush=True)
        if not report.exists():
            sys.exit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return results(report)


def results(report: Path) -> dict[str, bool]:
    """What a JUnit file says; skipped tests are left out."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if "skipped" not in outcomes:
            found["::".join(filter(None, (case.get("classname"), case.get("name"))))] = not outcomes & {
                "failure",
                "error",
            }
    return found


def main(checkout: str, *files: str) -> int:
    names = list(files or FILES)
    stock, accelerated = (run(Path(checkout), names, mode) for mode in ("stock", "accelerated"))
    counted = [name for name, passed in stock.items() if passed and not any(test in name for test in WIDER)]
    lost = [name for name in counted if not accelerated.get(name, False)]
    print(f"{len(counted) - len(lost)} of the {len(counted)} tests that pass on stock models pass on accelerated ones")
    print("\n".join(f"  fails: {name}" for name in lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
