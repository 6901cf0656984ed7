"""Writes the Triton kernels in the layout of Hugging Face's `kernels`, one build for every torch, GPU and system:

    python -m linlora.kernels.hub OUT     OUT/build/torch-universal/{__init__.py, ..., metadata.json} and OUT/README.md

What is uploaded from there loads without linlora: `hub = kernels.get_kernel("OWNER/NAME", version=0)`, then
`hub.lora_linear(hub.problem.LoraLinear(...))`. Several versions may run in one process, so modules import each other by
relative names alone, and the operators have a namespace of their own, from a hash of the sources. There are no autograd
functions in it: those are linlora's.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import inspect
import json
from pathlib import Path

from linlora.reference import dropout_threshold

_HERE = Path(__file__).parent
_LEFT_OUT = {"aot.py", "aot_cases.py", "hub.py"}  # tools of this repository
_REPLACED = {
    "__init__.py": ('__name__ == "linlora.kernels" and ', ""),
    "dropout.py": ("from linlora.reference import", "from .reference import"),
    "library.py": ('f"linlora::', 'f"NAMESPACE::'),
}
_CARD = """---
license: apache-2.0
tags: [kernels]
---
Triton kernels of LoRA layers together with their tangents, of linlora. No kernel has run on a GPU yet.
"""


def sources() -> tuple[str, dict[str, str]]:
    """The namespace of the operators, and the files of the build by name."""
    files = {path.name: path.read_text("utf-8") for path in sorted(_HERE.glob("*.py")) if path.name not in _LEFT_OUT}
    for name, (old, new) in _REPLACED.items():
        if files[name].count(old) != 1:
            raise ValueError(
                f"kernels/{name} holds {old!r} {files[name].count(old)} times, not once: see kernels/hub.py"
            )
        files[name] = files[name].replace(old, new)
    files["reference.py"] = (
        f'"""What the kernels have from the formulas."""\n\n\n{inspect.getsource(dropout_threshold)}'
    )
    namespace = "_linlora_" + hashlib.sha256("".join(files.values()).encode()).hexdigest()[:8]
    files["library.py"] = files["library.py"].replace("NAMESPACE::", f"{namespace}::")
    return namespace, files


def write(out: Path) -> Path:
    """Write the layout and return the folder of the build; ValueError where that holds what is not of this one."""
    build = out / "build" / "torch-universal"
    build.mkdir(parents=True, exist_ok=True)
    namespace, files = sources()
    if other := set(build.iterdir()) - {build / name for name in (*files, "metadata.json")}:
        raise ValueError(f"{min(other)} is of another build: remove {build}, or write to another folder")
    for name, text in files.items():
        (build / name).write_text(text, "utf-8")
    digests = {n: base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for n, t in files.items()}
    metadata = {
        "name": "linlora",
        "id": namespace,
        "version": 0,  # by the Hub's convention, of what is not for production
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda", "archs": ["8.0", "9.0", "10.0"]},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "README.md").write_text(_CARD)
    return build


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the layout")
    print(write(parser.parse_args().out))
