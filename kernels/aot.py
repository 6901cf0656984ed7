"""Compiles every configuration of the table ahead of time and checks what came out; needs no GPU.

    python -m linlora.kernels.aot                                  every architecture, a readable table
    python -m linlora.kernels.aot --widest                         a third of the cases, see `aot_cases.widest`
    python -m linlora.kernels.aot --arch 90 --op lora_linear --json report.json --jobs 2

Each case of `aot_cases` builds the launch that the host function would, from tensors on the meta device, and lets
Triton compile it for the architecture. The cubin must use no local memory (register spills), ask for no more registers
and shared memory than the architecture has, and use its tensor cores where the op has dots and the dtype has any.
Compiled is not run: this says nothing about results or speed. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .aot_cases import OPS, Case, cases, widest
from .configs import SHARED_LIMIT

ARCHITECTURES = (80, 90, 100)
REGISTERS = 65_536  # of a multiprocessor, each of 32 bits: what one program may use
TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")  # in PTX; ptxas makes HMMA, HGMMA and UTCHMMA of them


@dataclass(frozen=True)
class Result:
    """What the PTX and the cubin of a case hold."""

    case: str
    registers: int
    local_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]
    failures: tuple[str, ...]


def check(case: Case) -> Result:
    """Compiles the case and reads its cubin."""
    triton.runtime.driver.set_active(_CompileOnly(case.architecture))
    try:
        kernel = OPS[case.row.op].launch(case).compile()
    except Exception as error:
        return Result(str(case), 0, 0, 0, {}, (f"does not compile: {type(error).__name__}: {error}",))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {case}")
    registers, stack, _, local = map(int, usage.groups())
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", kernel.asm["ptx"])) for name in TENSOR_CORE}
    expected, shared, limit = _tensor_core_of(case), kernel.metadata.shared, SHARED_LIMIT[case.architecture]
    failures = []
    if stack + local > 0:
        failures.append(f"spills: {stack} B of stack, {local} B of local memory")
    if shared > limit:
        failures.append(f"{shared} B of shared memory, sm_{case.architecture} has {limit}")
    if registers * 32 * case.row.config.num_warps > REGISTERS:
        failures.append(f"{registers} registers in {case.row.config.num_warps} warps, there are {REGISTERS}")
    if expected is not None and counts[expected] == 0:
        failures.append(f"no {expected} in the code")
    found = {name: count for name, count in counts.items() if count}
    return Result(str(case), registers, stack + local, shared, found, tuple(failures))


def _tensor_core_of(case: Case) -> str | None:
    """The instruction a 16-bit dot must become; wgmma and tcgen05 take 64 rows or more. fp32 asks for none."""
    dot_rows = OPS[case.row.op].dot_rows
    if case.row.itemsize == 4 or dot_rows is None:
        return None
    if getattr(case.row.config, dot_rows) < 64 or case.architecture == 80:
        return "mma.sync"
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}[case.architecture]


class _CompileOnly:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m linlora.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all of them")
    parser.add_argument("--op", choices=sorted(OPS), action="append", default=[], help="default: all of them")
    parser.add_argument("--widest", action="store_true", help="one case for each row and kernel")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default 1)")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    todo = [case for architecture in options.arch or ARCHITECTURES for case in cases(architecture, options.op)]
    todo = list(widest(todo)) if options.widest else todo
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        print(f"{'case':108} registers  spills  shared   tensor-core instructions")
        for result in map(check, todo) if options.jobs == 1 else pool.map(check, todo):  # a pool starts on first use
            results.append(result)
            cores = " ".join(f"{name} {count}" for name, count in result.tensor_core.items())
            print(f"{result.case:108} {result.registers:9} {result.local_bytes:7} {result.shared_bytes:7}   {cores}")
            for failure in result.failures:
                print(f"    FAILED: {failure}")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    failed = sum(bool(result.failures) for result in results)
    print(f"{len(results)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
