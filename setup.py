"""Installs the three importable trees of this repository as one package.

`kernels/` and `bench/` live at the top level, where a reader looks for them, and install as
`linlora.kernels` and `linlora.bench`: a top-level import package named `kernels` would collide with the
PyPI package of that name.
"""

from setuptools import setup

setup(
    packages=[
        "linlora",
        "linlora.commands",
        "linlora.ops",
        "linlora.ops.aten",
        "linlora.ops.dual",
        "linlora.fusion",
        "linlora.routing",
        "linlora.stream",
        "linlora.training",
        "linlora.quickstart",
        "linlora.kernels",
        "linlora.bench",
    ],
    package_dir={"linlora.kernels": "kernels", "linlora.bench": "bench"},
    package_data={"linlora": ["py.typed"], "linlora.bench": ["results/*/*.json"]},
)
