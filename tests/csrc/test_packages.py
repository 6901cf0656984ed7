"""The packages: what is in them, and that they install and load without a checkout or an index."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from compiled import ROOT


def run(*command, cwd=ROOT):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def setup(project, base, *command):
    """Commands of a project's setup.py that leave nothing in the checkout."""
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", base, *command, "--dist-dir", base, cwd=project)


@pytest.fixture(scope="module")
def wheels(built, tmp_path_factory):
    """The folder of both wheels; `built` has compiled what the second links."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, ROOT / "csrc"):
        base = folder / project.name
        setup(project, folder, "build", "--build-base", base, "bdist_wheel", "--bdist-dir", base / "bdist")
    return folder


def test_both_install_from_a_folder_and_the_kernels_load(wheels, tmp_path):
    names = sorted(path.name for path in wheels.glob("*.whl"))
    assert re.fullmatch(r"linlora-[\d.]+-py3-none-any\.whl", names[0])
    assert re.fullmatch(r"linlora_cuda-[\d.]+-py3-none-linux_\w+\.whl", names[1])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, "--find-links", wheels, "--target", tmp_path, "linlora", "linlora-cuda")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from linlora.ops.cuda import library
print(library.__file__, library._LIBRARY, library.load(), library.status()["nvcc"], library.versions()[0])
"""
    package, kernels, obstacle, nvcc, runtime = run(sys.executable, "-c", program, cwd=tmp_path).split()
    assert package == str(tmp_path / "linlora/ops/cuda/library.py")
    assert (kernels, obstacle) == (str(tmp_path / "linlora_cuda/linlora_cuda.so"), "None")
    assert int(runtime) // 1000 == int(nvcc.split(".")[0])


def test_the_wheels_share_no_file(wheels):
    pure, kernels = (set(zipfile.ZipFile(wheel).namelist()) for wheel in sorted(wheels.glob("*.whl")))
    assert not pure & kernels
    assert {"linlora_cuda/__init__.py", "linlora_cuda/linlora_cuda.so", "linlora_cuda/build.json"} <= kernels
    assert not [name for name in pure if name.endswith((".so", "build.json"))]


def test_both_have_one_version():
    ours, kernels = ((ROOT / name).read_text() for name in ("pyproject.toml", "csrc/pyproject.toml"))
    (version,) = re.findall(r'^version = "(.*)"$', ours, flags=re.M)
    assert f'\nversion = "{version}"\n' in kernels
    assert f'\ndependencies = ["linlora=={version}"]\n' in kernels


def test_the_source_distribution_holds_what_the_readme_links_to(tmp_path):
    setup(ROOT, tmp_path, "sdist")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {str(PurePosixPath(*Path(name).parts[1:])) for name in packed.getnames()}
    readme = (ROOT / "README.md").read_text()
    named = {*re.findall(r"\]\(([\w./-]+)\)", readme), *re.findall(r"\bexamples/[\w./-]+\.\w+", readme)}
    assert len(named) > 10
    assert not named - held
    assert {"csrc/setup.py", "csrc/build.py", "csrc/linlora_cuda/__init__.py", "kernels/problem.py"} <= held
