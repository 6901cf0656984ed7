"""`linlora info`."""

from __future__ import annotations

import platform
import textwrap


def info() -> None:
    """Show versions, devices, and for each op which backend runs it and why not the others."""
    import peft
    import torch
    import transformers

    import linlora
    from linlora.backends import OPS

    print(f"linlora {linlora.__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {_triton()}, transformers {transformers.__version__}, peft {peft.__version__}")
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else ""
        print(f"\n{device}{name}")
        ops_by_answer: dict[str, list[str]] = {}
        for op in OPS:
            answer = str(linlora.explain(op, device)).removeprefix(f"{op} on {device} ")
            ops_by_answer.setdefault(answer, []).append(op)
        for answer, ops in ops_by_answer.items():
            print(textwrap.indent(textwrap.fill(", ".join(ops), 100) + "\n" + answer, "  "))


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "triton not installed"
    return f"triton {triton.__version__}"
