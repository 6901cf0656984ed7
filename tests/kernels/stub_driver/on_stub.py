"""What Triton's host side does with a launch, on the stub driver: one scenario a process, its findings as JSON.

    python on_stub.py rows|thread|fakes|cached

Kernels compile for sm_90 and are launched for real into the stub, which executes nothing: outputs are never written.
`TRITON_LIBCUDA_PATH` and `LD_LIBRARY_PATH` name the folder of the stub.
"""

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver


class StubDriver(driver.CudaDriver):
    """Triton's own driver, but for what it asks of a torch with CUDA."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.utils = driver.CudaUtils()
        self.launcher_cls = driver.CudaLauncher
        self.get_device_capability = lambda device=0: capability
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


triton.runtime.driver.set_active(StubDriver())
stub = ctypes.CDLL("libcuda.so.1")

from linlora.kernels import aot_cases, checks, counters, library  # noqa: E402
from linlora.kernels.problem import LoraLinear  # noqa: E402

checks.unavailable = lambda device: None  # tensors on the CPU are taken for tensors on the device


def count(name: str) -> int:
    return ctypes.c_long.in_dll(stub, name).value


def problem(m: int, pair: bool = True) -> LoraLinear:
    half, (A0, dA), (B0, dB) = torch.bfloat16, torch.zeros(2, 16, 4096), torch.zeros(2, 4096, 16)
    x, weight = torch.zeros(m, 4096, dtype=half), torch.zeros(4096, 4096, dtype=half)
    return LoraLinear(x, weight, None, A0, B0 if pair else None, dA if pair else None, dB, 2.0)


def rows() -> dict[str, Any]:
    """Tensor maps and launches of every row, compiled ahead of time, that reads through tensor descriptors, and of the
    transposed weight that the largest tile reads."""
    found = {}
    of_rows = [case for case in aot_cases.cases(90, ["linearized_lora_linear"]) if case.row.config.design == "flags"]
    transposed = max((case for case in of_rows if "adjoint" in case.variant), key=lambda case: case.row.config.block_n)
    for case in (*aot_cases.widest(of_rows), transposed):
        before = count("stub_tensor_maps"), count("stub_launches")
        aot_cases.OPS[case.row.op].launch(case).run(torch.device("cpu"))
        after = count("stub_tensor_maps"), count("stub_launches")
        found[str(case)] = [b - a for a, b in zip(before, after, strict=True)]
    return found


def thread() -> dict[str, Any]:
    """A launch by a new thread, which has no context, as the one in which autograd runs backward."""
    called, errors = problem(2048), []
    library.lora_linear(called)

    def launch() -> None:
        try:
            library.lora_linear(called)
        except RuntimeError as error:
            errors.append(str(error))

    before = count("stub_bound_contexts")
    other = threading.Thread(target=launch)
    other.start()
    other.join()
    return {"errors": errors, "launches": count("stub_launches"), "bound": count("stub_bound_contexts") - before}


def fakes() -> dict[str, Any]:
    """Counters asked for under FakeTensorMode, and then by a launch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        counters.counters(torch.device("cpu"), 4096)
    return {"kind": type(counters.counters(torch.device("cpu"), 65)).__name__}


def cached() -> dict[str, Any]:
    """Launches of one problem, again and again: what is done every time, and how long the host takes, in µs."""
    found, bound = {}, []
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = lambda *args, **options: (bound.append(1), run(*args, **options))[1]
    calls = {"flags, pair": problem(2048), "flags, short": problem(2048, pair=False), "M = 8": problem(8)}
    for name, called in calls.items():
        library.lora_linear(called)
        bound.clear()
        before = count("stub_tensor_maps"), count("stub_launches")
        seconds = []
        for _ in range(20):
            began = time.thread_time()
            for _ in range(50):
                library.lora_linear(called)
            seconds.append((time.thread_time() - began) / 50)
        after = count("stub_tensor_maps"), count("stub_launches")
        maps, launches = (b - a for a, b in zip(before, after, strict=True))
        found[name] = {
            "maps": maps, "launches": launches, "bound": len(bound), "host_us": round(1e6 * min(seconds), 1),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (rows, thread, fakes, cached)}
    print(json.dumps(scenarios[sys.argv[1]](), indent=1))
