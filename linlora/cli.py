"""The command line: `linlora info | quickstart | bench`."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="linlora",
    help="Linearized LoRA fine-tuning at the cost of plain LoRA.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.command()
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


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")] = Path(
        "runs/quickstart"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.", min=1)] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the directory holds and start over.")] = False,
) -> None:
    """Train, fuse and compare plain and linearized LoRA adapters on handwritten digits (about four minutes)."""
    from linlora import quickstart as job

    _or_exit(lambda: job.run(out, device=device, seeds=seeds, fresh=fresh))


def _or_exit(job: Callable[[], object]) -> None:
    """Run a job; an error a user can act on is printed as one line, not as a traceback."""
    import linlora

    expected = (ValueError, FileNotFoundError, FileExistsError, linlora.BackendUnavailableError)
    try:
        job()
    except expected as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "triton not installed"
    return f"triton {triton.__version__}"


def main() -> None:
    """Entry point of the `linlora` command."""
    from linlora.bench.cli import app as bench

    app.add_typer(bench, name="bench", help="Benchmark linlora against torch.func, PEFT and the frozen layer.")
    app()


if __name__ == "__main__":
    main()
