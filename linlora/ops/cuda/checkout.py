"""csrc/ of a checkout: sources that are not installed, and the scripts beside them that build them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).parents[3] / "csrc"


def script(path: str) -> ModuleType | None:
    """The module csrc/`path`; None where linlora is not run from a checkout."""
    file = CSRC / path
    if not file.exists():
        return None
    name = "linlora_csrc_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} cannot be loaded")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
