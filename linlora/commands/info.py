"""`linlora info`."""

from __future__ import annotations

import platform
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table


def info() -> None:
    """Show versions, the kernels with where they have run, and for each op which backend runs it and why."""
    import peft
    import torch
    import transformers

    import linlora
    from linlora.ops.backends import OPS

    print(f"linlora {linlora.__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {_triton()}, transformers {transformers.__version__}, peft {peft.__version__}")
    print(_cuda_kernels())
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(_table())
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" else ""
        print(f"\n{device}{name}{_evidence(device)}")
        ops_by_answer: dict[str, list[str]] = {}
        for op in OPS:
            answer = str(linlora.explain(op, device)).removeprefix(f"{op} on {device} ")
            ops_by_answer.setdefault(answer, []).append(op)
        for answer, ops in ops_by_answer.items():
            print(textwrap.indent(textwrap.fill(", ".join(ops), 100) + "\n" + answer, "  "))


def _table() -> Table:
    """Every op and its kernels: there or not, and the GPUs that have executed them, by the package and this machine."""
    from linlora.ops import cuda
    from linlora.ops.backends import OPS
    from linlora.ops.evidence import executed_on

    table = Table("op", "torch", "triton", "cuda", title="Kernels, and the GPUs that have run them")
    table.title_justify, table.box = "left", box.SIMPLE_HEAD
    for op in OPS:
        has_cuda = op in cuda.OPS
        cells = {name: ", ".join(executed_on(op, name)) or "not yet run on a GPU" for name in ("triton", "cuda")}
        built = "" if cuda.library.status()["built"] else "not built; "
        table.add_row(op, "composed", cells["triton"], built + cells["cuda"] if has_cuda else "–")
    return table


def _evidence(device: str) -> str:
    """How many calls of a GPU are measured, and where that is written."""
    from linlora.ops import evidence

    if device == "cpu":
        return ""
    index = int(device.removeprefix("cuda:"))
    measured, place = len(evidence.own_entries(index)), evidence.folder() / evidence.key(evidence.machine(index))
    return f": {measured} calls measured in {place}" if measured else ": no call measured here; `linlora tune` does it"


def _cuda_kernels() -> str:
    from linlora.ops.cuda import library

    status = library.status()
    if not status["built"]:
        return f"CUDA kernels: not built: {status['reason']}; {library.REMEDY}"
    names = ", ".join(f"sm_{name}" for name in status["architectures"])
    stale = "; csrc/ has changed since, `make cuda` builds it again" if library.stale() else ""
    return f"CUDA kernels: built for {names} by nvcc {status['nvcc']}, {status['bytes'] / 2**20:.1f} MiB{stale}"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "triton not installed"
    return f"triton {triton.__version__}"
