"""Builds one kernel source of csrc/ with the host's C++ compiler, for the emulated machine: a library for ctypes.

library = ctypes.CDLL(str(build("lora_linear_sm80")))  # of csrc/lora_linear_sm80.cu
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parents[2] / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O2", *WARNINGS, "-shared", "-fPIC", "-DLINLORA_EMULATE"]
MACHINE = [EMULATOR / "machine.cpp", EMULATOR / "memory.cpp"]


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++, whichever comes first; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++", "c++"))), None)


def build(kernel: str) -> Path:
    """The library of csrc/`kernel`.cu, with the entries of emulator/`kernel`.cpp."""
    return build_sources([CSRC / f"{kernel}.cu", EMULATOR / f"{kernel}.cpp", *MACHINE])


def build_operator(torch: Path, target: str) -> Path:
    """The library of csrc/register.cpp for tensors of the CPU; `target` is the -D of torch's version."""
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-DLINLORA_SM90", target, f"-I{EMULATOR / 'runtime'}"]
    flags += [f"-I{torch}/include", "-include", str(EMULATOR / "torch_on_cpu.h"), f"-L{torch}/lib"]
    return build_sources([CSRC / "register.cpp", EMULATOR / "register.cpp"], flags, ["-Wl,--no-as-needed", "-ltorch"])


def build_sources(sources: Sequence[Path], flags: Sequence[str] = FLAGS, links: Sequence[str] = ()) -> Path:
    """The library of these sources, built once for each state of them and of csrc/'s headers.

    Raises RuntimeError without a compiler, and with the compiler's message where it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or name one in CXX")
    if "clang" not in Path(cxx).name:  # g++ makes the static variables of inline functions one for all libraries
        flags = [*flags, "-fno-gnu-unique"]
    read = sorted({*sources, *CSRC.glob("*.cuh"), *CSRC.glob("*.h"), *EMULATOR.rglob("*.h")})
    state = hashlib.sha256(repr((cxx, flags, [(path.name, path.read_bytes()) for path in read])).encode())
    folder = Path(tempfile.gettempdir()) / f"linlora-emulator-{os.getuid()}"  # a container's user may have no name
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is of another user and would be run; set TMPDIR to a folder of yours")
    library = folder / f"{sources[0].stem}-{state.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            command = [
                cxx,
                *flags,
                f"-I{CSRC}",
                f"-I{EMULATOR.parent}",
                "-x",
                "c++",
                *map(str, sources),
                "-o",
                str(built),
                *links,
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
            built.replace(library)  # whole or not at all: other processes build the same
    return library
