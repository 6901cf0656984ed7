"""Installs the three importable trees of this repository as one package. The CUDA kernels are another: csrc/setup.py.

`kernels/` and `bench/` live at the top level, where a reader looks for them, and install as
`linlora.kernels` and `linlora.bench`: a top-level import package named `kernels` would collide with the
PyPI package of that name.
"""

from setuptools import find_packages, setup

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
)
