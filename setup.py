"""Installs the three importable trees of this repository as one package, and the CUDA kernels where they can be built.

`kernels/` and `bench/` live at the top level, where a reader looks for them, and install as
`linlora.kernels` and `linlora.bench`: a top-level import package named `kernels` would collide with the
PyPI package of that name.

LINLORA_BUILD_CUDA=1 makes it an error when the CUDA kernels cannot be built, 0 leaves them out. Unset, they are built
where nvcc, ninja and torch's headers are there. pip hides what is printed here: `linlora info` says it again.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

HERE = Path(__file__).resolve().parent


class BuildCuda(Command):
    """Builds csrc/ (see csrc/build.py), or notes why not."""

    description = "build the CUDA kernels"
    user_options: ClassVar[list] = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        csrc = _csrc_build()
        wanted = os.environ.get("LINLORA_BUILD_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"LINLORA_BUILD_CUDA={wanted!r}: 1 builds the CUDA kernels, 0 does not, unset tries")
        folder = self.folder()
        try:
            if wanted == "0":
                raise csrc.CannotBuildError("LINLORA_BUILD_CUDA=0 when linlora was installed")
            status = csrc.build(folder)
        except csrc.CannotBuildError as error:
            if wanted == "1":
                raise SystemExit(f"LINLORA_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
            status = csrc.Status(False, str(error))
            if not (folder / csrc.LIBRARY).exists():
                status.save(folder)
        print(f"linlora: {status}", file=sys.stderr)

    def folder(self):
        csrc = _csrc_build()
        return csrc.IN_PLACE if self.editable_mode else Path(self.build_lib, *csrc.IN_PLACE.parts[-3:])

    def get_source_files(self):
        return [str(path.relative_to(HERE)) for path in _csrc_build().sources()]

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands: ClassVar[list] = [*build.sub_commands, ("build_cuda", None)]


class Wheel(bdist_wheel):
    """Bound to the platform where it holds CUDA kernels, and to no Python: they use none of its interface."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not (self.get_finalized_command("build_cuda").folder() / _csrc_build().LIBRARY).exists()
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def _csrc_build():
    """csrc/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("linlora_csrc_build", HERE / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup(
    packages=[*find_packages(include=["linlora", "linlora.*"]), "linlora.kernels", "linlora.bench"],
    package_dir={"linlora.kernels": "kernels", "linlora.bench": "bench"},
    package_data={
        "linlora": ["py.typed", "__init__.pyi"],
        "linlora.training": ["__init__.pyi"],
        "linlora.ops": ["evidence.json"],
        "linlora.quickstart": ["text.yaml"],
        "linlora.quickstart.glyphs": ["data/*"],
        "linlora.experiments": ["__init__.pyi"],
    },
    cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
)
