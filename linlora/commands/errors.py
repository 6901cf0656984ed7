"""Ends a command that cannot do its work: one line on stderr, and a status that says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer

INVALID, INTERRUPTED = 2, 130
_OF_PACKAGES = (
    ("safetensors", "SafetensorError"),
    ("torch", "OutOfMemoryError"),
    ("linlora.layers.finding", "UnsupportedLayerError"),
    ("linlora.ops.backends", "BackendUnavailableError"),
    ("linlora.bench.tuning", "TuneError"),
)


@contextmanager
def user_errors(interrupted: str = "interrupted; nothing was written") -> Iterator[None]:
    """Run a job; an error a user can act on is printed as one line, not as a traceback.

    Args:
        interrupted: what to tell the user of a job ended by Ctrl-C.

    Raises typer.Exit: status 2 for such an error, 130 where interrupted. Any other error is a bug and keeps its
    traceback.

    >>> try:
    ...     with user_errors():
    ...         raise ValueError("no such method")
    ... except typer.Exit as ended:
    ...     print(ended.exit_code)
    2
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        say_error(str(error))
        raise typer.Exit(INVALID) from error
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(INTERRUPTED) from None


def say_error(message: str) -> None:
    """Print an error as one line."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}", highlight=False)


def _expected() -> tuple[type[BaseException], ...]:
    """Errors a user can act on. Those of a package that was not imported cannot have been raised."""
    there = [(sys.modules.get(module), name) for module, name in _OF_PACKAGES]
    return (ValueError, OSError, ImportError, *(getattr(module, name) for module, name in there if module is not None))


def refuse_missing(paths: Iterable[str | os.PathLike]) -> None:
    """Raise a FileNotFoundError for a path that is not there, before anything slow is imported."""
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{path}: no such file or folder; an adapter of the Hugging Face hub has to be downloaded first: "
                "hf download OWNER/NAME --local-dir FOLDER"
            )
