"""Compiles csrc/ with compilers of several CUDA versions, from PyPI, and looks for spills and serialized wgmma:

    python tests/csrc/compile_matrix.py 12.6 12.8 13.2      or `make compile-matrix`

Of CUDA 13 PyPI has nvcc as a whole: the library is built. Of CUDA 12, up to 12.9, `nvidia-cuda-nvcc-cu12` holds ptxas
and libnvvm without a front end (`nvcc`, `cudafe++`, `cicc`), and `nvidia-cuda-nvcc` begins with 13.0. So there ptxas
assembles the PTX that the nvcc of this machine makes: that shows that instructions, registers and schedule are right
there, not that headers and front end are. Exits with 1 where one fails. Minutes of work for each; no test runs it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from compiled import ROOT, csrc

PTX_ISA = {"12.6": "8.5", "12.8": "8.7", "12.9": "8.8"}  # the newest that the assembler of a version knows
WHOLE = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")


def installed(folder: Path, *packages: str) -> Path:
    """A folder with packages of PyPI in it."""
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *packages], check=True)
    return folder


def whole(version: str, folder: Path) -> list[str]:
    """The problems of a library built by nvcc of a version."""
    packages = [f"{package}=={version}.*" for package in WHOLE]
    os.environ["CUDA_HOME"] = str(installed(folder / "toolkit", *packages) / "nvidia" / f"cu{version.split('.')[0]}")
    print(csrc.build(folder / "library", folder / "objects"))
    return csrc.problems(folder / "objects")


def assembled(version: str, folder: Path) -> list[str]:
    """The problems of the kernels' PTX in the assembler of a version."""
    package = f"nvidia-cuda-nvcc-cu12=={version}.*"
    ptxas = installed(folder / "toolkit", package) / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)
    tools, found = csrc.toolchain(), []
    for source, architecture in (("lora_linear_sm80", "80"), ("lora_linear_sm90", "90a")):
        ptx = folder / f"{source}.ptx"
        gencode = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
        command = [tools.nvcc, "-std=c++17", "-O3", gencode, "-ptx", ROOT / "csrc" / f"{source}.cu", "-o", ptx]
        subprocess.run(command, check=True)
        ptx.write_text(re.sub(r"^\.version .*$", f".version {PTX_ISA[version]}", ptx.read_text(), flags=re.M))
        command = [ptxas, "-v", f"-arch=sm_{architecture}", ptx, "-o", folder / f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / f"{source}.o.log").write_text(done.stdout + done.stderr)
        found += [] if done.returncode == 0 else [f"{source}: {(done.stdout + done.stderr)[:500]}"]
    (folder / "build.ninja").write_text("".join(f"build {log.stem}: compile\n" for log in folder.glob("*.o.log")))
    print(f"{len(csrc.reports(folder))} kernels assembled by ptxas {version}")
    return found + csrc.problems(folder)


def main() -> int:
    failed = False
    for version in sys.argv[1:]:
        folder = ROOT / "build" / "matrix" / version
        folder.mkdir(parents=True, exist_ok=True)
        try:
            problems = (assembled if version.startswith("12") else whole)(version, folder)
        except csrc.CannotBuildError as error:
            problems = [str(error)]
        failed |= bool(problems)
        print(f"CUDA {version}: {'; '.join(problems) or 'nothing spills, no wgmma is serialized'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
