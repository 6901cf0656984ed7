"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import linlora
from linlora import bench, kernels

_OTHERS = ("__main__", ".test_layer", ".linlora_cuda")  # the last is the CUDA library, where it is built
MODULES = sorted(
    module.name
    for package in (linlora, kernels, bench)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(_OTHERS)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_public_functions_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    public = [getattr(linlora, name) for name in linlora.__all__ if callable(getattr(linlora, name))]
    functions = [
        thing for thing in public if not (isinstance(thing, type) and issubclass(thing, (Exception, linlora.Report)))
    ]
    assert len(functions) >= 8
    assert not [thing.__name__ for thing in functions if not any(test.examples for test in finder.find(thing))]
