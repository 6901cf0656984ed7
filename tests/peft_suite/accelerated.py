"""A pytest plugin for PEFT's own tests: LoRA configurations alone, on models that linlora accelerates or on stock ones.

Every PeftModel is given to `linlora.accelerate` when it is made; a model with layers that linlora refuses stays stock.
LINLORA_PEFT_SUITE=stock leaves all of them stock. Tests of other tuners are deselected.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig, PeftModel

import linlora


class _Anything(ModuleType):
    """A package that PEFT's tests import by the way and that is not installed here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for package in ("diffusers", "parameterized"):
    if importlib.util.find_spec(package) is None:
        sys.modules[package] = _Anything(package)

made = {"accelerated": 0, "stock": 0}

if os.environ.get("LINLORA_PEFT_SUITE") != "stock":
    _init = PeftModel.__init__

    def _accelerated(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        _init(self, *args, **kwargs)
        try:
            linlora.accelerate(self)
            made["accelerated"] += 1
        except (TypeError, ValueError):  # other tuners, and layers that linlora refuses
            made["stock"] += 1

    PeftModel.__init__ = _accelerated  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _of_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _of_lora(item: Any) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("config_cls", LoraConfig) is LoraConfig


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"PeftModels accelerated: {made['accelerated']}, stock: {made['stock']}")
