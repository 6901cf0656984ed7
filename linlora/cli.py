"""The command line, `linlora COMMAND`: the commands of `linlora.commands` and `linlora.bench`, assembled."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import linlora
from linlora.commands.compare import compare
from linlora.commands.evaluate import evaluate
from linlora.commands.export import export
from linlora.commands.fuse import fuse
from linlora.commands.info import info
from linlora.commands.inspect import inspect
from linlora.commands.merge import merge
from linlora.commands.plain import PlainCommand
from linlora.commands.quickstart import quickstart
from linlora.commands.train import train
from linlora.commands.tune import tune

app = typer.Typer(
    name="linlora",
    help="Linearized LoRA fine-tuning at the cost of plain LoRA.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",  # paragraphs flow
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"linlora {linlora.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Linearized LoRA fine-tuning at the cost of plain LoRA."""


app.command(cls=PlainCommand)(info)
app.command(cls=PlainCommand)(quickstart)
app.command(cls=PlainCommand)(train)
app.command("eval", cls=PlainCommand)(evaluate)
app.command(cls=PlainCommand)(compare)
app.command(cls=PlainCommand, context_settings={"ignore_unknown_options": True})(fuse)
app.command(cls=PlainCommand)(inspect)
app.command(cls=PlainCommand)(export)
app.command(cls=PlainCommand)(merge)
app.command(cls=PlainCommand)(tune)


def main() -> None:
    """Entry point of the `linlora` command."""
    from linlora.bench.cli import app as bench

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a formula must not end a run where the locale has no such letters
    app.add_typer(bench, name="bench")
    app()


if __name__ == "__main__":
    main()
