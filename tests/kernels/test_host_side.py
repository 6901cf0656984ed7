"""The host side of a launch, on a stand-in for the driver: tensor maps, contexts of threads, what calls keep.

A process that interprets kernels cannot launch them, hence the subprocesses.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).parent / "stub_driver"


@pytest.fixture(scope="session")
def on_stub(tmp_path_factory):
    """Runs a scenario of `stub_driver/on_stub.py` and returns what it found."""
    folder = tmp_path_factory.mktemp("stub")
    library = folder / "libcuda.so.1"
    from triton.backends import nvidia

    compiler = shutil.which("gcc")
    assert compiler, "Triton itself needs a C compiler to launch kernels: install gcc"
    include = Path(nvidia.__path__[0], "include")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", "-o", str(library)]
    subprocess.run([*command, str(STUB / "stub_driver.c")], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}

    def run(scenario):
        done = subprocess.run(
            [sys.executable, str(STUB / "on_stub.py"), scenario],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def test_the_driver_accepts_the_tensor_maps_of_every_row(on_stub):
    found = on_stub("rows")
    assert found
    assert all(counts == [3, 1] for counts in found.values()), found  # x, W and y; one launch


def test_a_thread_without_a_context_is_given_one(on_stub):
    assert on_stub("thread") == {"errors": [], "launches": 2, "bound": 1}


def test_counters_made_under_fake_tensors_are_not_kept_for_a_launch(on_stub):
    assert on_stub("fakes") == {"kind": "Tensor"}


def test_a_repeated_launch_goes_past_tritons_binder(on_stub):
    for found in on_stub("cached").values():
        assert (found["launches"], found["bound"]) == (1000, 0)
        print(f"{found['host_us']} us of the host a launch")
