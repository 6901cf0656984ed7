"""The distribution linlora-cuda: the library of csrc/, which linlora of the same version loads.

    pip install --no-build-isolation ./csrc      builds it with nvcc, ninja and torch's headers; says what is missing

One wheel serves every Python and every torch from 2.11 on: it is named after the platform alone.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _builder():
    """build.py beside this file, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("linlora_csrc_build", Path(__file__).resolve().parent / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_py):
    def run(self):
        super().run()
        csrc = _builder()
        try:
            print(csrc.build(Path(self.build_lib) / "linlora_cuda"), file=sys.stderr)
        except csrc.CannotBuildError as error:
            raise SystemExit(f"the CUDA kernels cannot be built: {error}") from None


class Binary(Distribution):
    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(distclass=Binary, packages=["linlora_cuda"], cmdclass={"build_py": BuildLibrary, "bdist_wheel": Wheel})
