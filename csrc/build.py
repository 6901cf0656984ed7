"""Builds csrc/ into one shared object that every torch from 2.11 on can load: `python csrc/build.py` builds in place.

Needs nvcc (CUDA 12.6 or later), ninja and torch's headers (of a CPU build too: no GPU is looked at), and nothing of
linlora: setup.py beside it and the tests load this file by its path. What it makes is bound to no Python, for operators
register themselves when `torch.ops.load_library` opens it, and to no torch version, for only the stable ABI is included
(torch/csrc/stable, torch/headeronly). The CUDA runtime is linked statically: that of CUDA 12 runs with drivers from
R525 on, so beside every torch; that of CUDA 13 needs R580.

    LINLORA_CUDA_ARCHITECTURES="80;90a;100"   what to compile for (unset: of these what nvcc knows: 100 from 12.8 on);
                                              sources named *_sm90.cu are for 90a alone
    CUDA_HOME                                 where bin/nvcc is looked for before the PATH
    MAX_JOBS                                  compilations at a time

Every compilation keeps what ptxas said: `--check` fails on spilled registers and on serialized wgmma.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
IN_PLACE = SOURCES.parent / "linlora" / "ops" / "cuda"
LIBRARY = "linlora_cuda.so"
STATUS = "build.json"
ARCHITECTURES = ("80", "90a", "100")
_HOPPER = "90a"
_OLDEST_CUDA = (12, 6)  # that _TARGET_TORCH is made with
_TARGET_TORCH = (2, 11)  # the oldest torch that can load what is built


class CannotBuildError(Exception):
    """Something that building needs is missing, or a compilation failed; the message says what to do."""


@dataclass(frozen=True)
class Toolchain:
    """Where the three things are that building needs."""

    nvcc: str
    ninja: str
    torch: str  # the folder of the package: its headers and libraries, of the environment that is installed into


@dataclass(frozen=True)
class Status:
    """What became of a build; `build.json` beside the library, which `linlora info` prints."""

    built: bool
    reason: str = ""  # why it was not built, and the remedy
    architectures: tuple[str, ...] = ()
    nvcc: str = ""
    bytes: int = 0
    sources: str = ""  # their hash

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{STATUS}.{os.getpid()}.tmp"
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(draft, folder / STATUS)

    def __str__(self) -> str:
        if not self.built:
            return f"CUDA kernels not built: {self.reason}"
        names = ", ".join(f"sm_{architecture}" for architecture in self.architectures)
        driver = "R580" if _numbers(self.nvcc) >= (13,) else "R525"
        size = f"{self.bytes / 2**20:.1f} MiB"
        return f"CUDA kernels built for {names} by nvcc {self.nvcc}: {size}, for drivers from {driver} on"


@dataclass(frozen=True)
class KernelReport:
    """What ptxas said about one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int


def build(folder: Path = IN_PLACE, objects: Path = SOURCES.parent / "build" / "csrc") -> Status:
    """Build `folder`/linlora_cuda.so, reusing what `objects` holds of an earlier build. Raises CannotBuildError."""
    tools = toolchain()
    architectures = selected_architectures(tools.nvcc)
    objects.mkdir(parents=True, exist_ok=True)
    with _locked(objects):
        (objects / "build.ninja").write_text(ninja_file(tools, architectures, objects))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        made = subprocess.run([tools.ninja, "-C", str(objects), *jobs], capture_output=True, text=True)
        if made.returncode != 0:
            (log := objects / "failed.log").write_text(made.stdout + made.stderr)
            first = next((line for line in made.stdout.splitlines() if "error" in line.lower()), made.stdout[:200])
            raise CannotBuildError(f"a compilation failed ({first.strip()}): see {log}")
        _copy(objects / LIBRARY, folder / LIBRARY)
        status = Status(
            True, "", architectures, _nvcc_version(tools.nvcc), (folder / LIBRARY).stat().st_size, source_hash()
        )
        status.save(folder)
        return status


def selected_architectures(nvcc: str) -> tuple[str, ...]:
    """What LINLORA_CUDA_ARCHITECTURES names, or all that the compiler knows. CannotBuildError for other names."""
    text = os.environ.get("LINLORA_CUDA_ARCHITECTURES", "")
    chosen = tuple(re.findall(r"[^;,\s]+", text))
    unknown = [name for name in chosen if name not in ARCHITECTURES]
    if unknown:
        raise CannotBuildError(
            f"LINLORA_CUDA_ARCHITECTURES={text!r}: {unknown[0]!r} is not one of {'; '.join(ARCHITECTURES)} "
            "(80 also serves every later GPU that is not named, compiled by its driver)"
        )
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = tuple(name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in listed)  # without the suffix there
    if beyond := [name for name in chosen if name not in known]:
        raise CannotBuildError(
            f"nvcc {_nvcc_version(nvcc)} does not compile for sm_{beyond[0]}: CUDA 12.8 compiles for all of "
            f"{'; '.join(ARCHITECTURES)}, 12.6 for all but 100"
        )
    return tuple(name for name in known if name in (chosen or known))


def toolchain() -> Toolchain:
    """What is there to build with. Raises CannotBuildError that names everything that is missing."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    torch = _torch()
    missing = []
    if nvcc is None:
        missing.append("nvcc is not on the PATH nor under CUDA_HOME (install the CUDA toolkit)")
    elif _numbers(_nvcc_version(nvcc)) < _OLDEST_CUDA:
        missing.append(f"{nvcc} is of CUDA {_nvcc_version(nvcc)}, and CUDA 12.6 or later is needed")
    if ninja is None:
        missing.append("ninja is not there (pip install ninja)")
    if torch is None:
        missing.append(
            "torch with its headers is not there (pip install torch, and linlora-cuda with --no-build-isolation)"
        )
    elif (version := _torch_version(torch)) < _TARGET_TORCH:
        missing.append(f"torch {'.'.join(map(str, version))} is older than {'.'.join(map(str, _TARGET_TORCH))}")
    if nvcc is None or ninja is None or torch is None or missing:
        raise CannotBuildError("; ".join(missing))
    return Toolchain(nvcc, ninja, str(torch))


def ninja_file(tools: Toolchain, architectures: tuple[str, ...], objects: Path) -> str:
    """The build: an object a source, one library."""
    units = {source: _targets(source, architectures) for source in sources()}
    flags = [
        "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--threads=0",
        f"-DTORCH_TARGET_VERSION={target_version()}", "-DUSE_CUDA",
        *(["-DLINLORA_SM90"] if _HOPPER in architectures else []),
        f"-I{tools.torch}/include",
    ]  # fmt: skip
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {_words(tools.nvcc)}",
        f"flags = {_words(*flags)}",
        "rule compile",
        "  command = $nvcc $flags $target -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $nvcc -shared --no-device-link -cudart static $in -o $out {_words(f'-L{tools.torch}/lib')} "
        "-Xlinker --no-as-needed -ltorch",
    ]
    made = []
    for source, targets in units.items():
        if targets is not None:
            made.append(f"{source.stem}.o")
            lines += [f"build {made[-1]}: compile {_path(source)}", f"  target = {_words(*targets)}"]
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(made)}", ""])


def target_version() -> str:
    """The version of torch's stable ABI, as its headers want it."""
    return f"0x{_TARGET_TORCH[0]:02x}{_TARGET_TORCH[1]:02x}000000000000"


def sources() -> list[Path]:
    """What is compiled: kernels, one file an op and architecture, and the registration."""
    return sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])


def source_hash(folder: Path = SOURCES) -> str:
    """A hash of everything that the library is made of."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def reports(objects: Path) -> list[KernelReport]:
    """What ptxas said of every kernel, from the logs of a build."""
    found = []
    for log in _logs(objects):
        pattern = (
            r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers"
        )
        for name, architecture, stores, loads, registers in re.findall(pattern, log.read_text(), flags=re.S):
            found.append(KernelReport(name, architecture, int(registers), int(stores) + int(loads)))
    return found


def problems(objects: Path) -> list[str]:
    """What is wrong with compiled kernels, a line each: spilled registers, serialized wgmma."""
    spilled = [
        f"{report.kernel} for sm_{report.architecture} spills {report.spilled_bytes} bytes"
        for report in reports(objects)
        if report.spilled_bytes
    ]
    serialized = [
        line
        for log in _logs(objects)
        for line in log.read_text().splitlines()
        if "wgmma" in line and ("serializ" in line or "C75" in line)
    ]
    return spilled + serialized


def _logs(objects: Path) -> list[Path]:
    """The logs of the last build: of its objects, not of those of earlier ones."""
    made = re.findall(r"^build (\S+): compile", (objects / "build.ninja").read_text(), flags=re.M)
    return [objects / f"{name}.log" for name in made]


def _targets(source: Path, architectures: tuple[str, ...]) -> list[str] | None:
    """The -gencode flags of a source; None where none of the architectures is its own.

    The portable code also holds PTX, which the driver of any other GPU compiles.
    """
    if source.suffix == ".cpp":
        return []
    own = tuple(a for a in architectures if a == _HOPPER) if source.stem.endswith("_sm90") else architectures
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in own]
    if "80" in own:
        targets.append("-gencode=arch=compute_80,code=compute_80")
    return targets or None


def _torch() -> Path | None:
    """torch of the environment that is installed into: pip's build isolation hides it from imports, not from here."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    candidates += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("platlib", "purelib")]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


def _torch_version(torch: Path) -> tuple[int, int]:
    text = (torch / "include/torch/headeronly/version.h").read_text()
    major, minor = (re.search(rf"#define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else (0, 0)


def _nvcc_version(nvcc: str) -> str:
    found = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "of an unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _words(*words: str) -> str:
    """Words of a shell command, in a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """A path, in a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _copy(source: Path, target: Path) -> None:
    """A whole new file in one step: a process that has the old one open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy2(source, draft)
    os.replace(draft, target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where setup.py imports this file too

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """The command line; the exit status is 1 when nothing was built, or with --check when a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IN_PLACE, help="folder of the library (default: in place)")
    parser.add_argument("--objects", type=Path, default=SOURCES.parent / "build" / "csrc", help="folder of the objects")
    parser.add_argument("--check", action="store_true", help="list every kernel; fail on spills")
    arguments = parser.parse_args()
    try:
        status = build(arguments.out, arguments.objects)
    except CannotBuildError as error:
        status = Status(False, str(error))
        if not (arguments.out / LIBRARY).exists():
            status.save(arguments.out)
        print(f"{status}; `make cuda` tries again, and linlora runs without them", file=sys.stderr)
        return 1
    print(status)
    if not arguments.check:
        return 0
    for report in reports(arguments.objects):
        print(f"  sm_{report.architecture:4} {report.registers:3} registers  {report.kernel}")
    found = problems(arguments.objects)
    print("\n".join(found) or "nothing spills")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
