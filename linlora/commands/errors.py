"""Ends a command that cannot do its work: one line on stderr, and a status that says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

INVALID, INTERRUPTED = 2, 130


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
    import torch
    from safetensors import SafetensorError

    import linlora

    expected = (
        ValueError, OSError, ImportError, SafetensorError, torch.OutOfMemoryError, linlora.UnsupportedLayerError,
        linlora.BackendUnavailableError,
    )  # fmt: skip
    try:
        yield
    except expected as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(INVALID) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(interrupted)
        raise typer.Exit(INTERRUPTED) from None
