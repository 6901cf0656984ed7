"""Builds one kernel source of csrc/ with the host's C++ compiler, for the emulated machine: a library for ctypes.

library = ctypes.CDLL(str(build("lora_linear_sm80")))  # of csrc/lora_linear_sm80.cu
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

EMULATOR = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O2", *WARNINGS, "-shared", "-fPIC", "-DLINLORA_EMULATE"]


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++, whichever comes first; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++", "c++"))), None)


def build(kernel: str, csrc: Path = EMULATOR.parent) -> Path:
    """The library of `kernel` from the sources under `csrc`; built once for each state of the sources.

    Raises RuntimeError without a compiler, and with the compiler's message where it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or name one in CXX")
    emulator = csrc / "emulator"
    sources = [csrc / f"{kernel}.cu", emulator / f"{kernel}.cpp", emulator / "machine.cpp"]
    read = sorted({*sources, *csrc.glob("*.cuh"), *csrc.glob("*.h"), *emulator.glob("*.h")})
    state = hashlib.sha256(repr((cxx, FLAGS, [(path.name, path.read_bytes()) for path in read])).encode())
    folder = Path(tempfile.gettempdir()) / f"linlora-emulator-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{kernel}-{state.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            command = [cxx, *FLAGS, "-x", "c++", *map(str, sources), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
            built.replace(library)  # whole or not at all: other processes build the same
    return library
