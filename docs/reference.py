"""Writes the pages commands.md and settings.md from the code when the site is built, as a hook of mkdocs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import typer


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "settings.md", content=settings()))
    return files


def commands() -> str:
    """Every command with its help, arguments and options."""
    from linlora.bench.cli import app as bench

    from linlora.cli import app

    lines = ["# Command line", "", "`linlora COMMAND --help` says the same.", ""]
    for name, command in [
        *_commands(typer.main.get_command(app), "linlora"),
        *_commands(typer.main.get_command(bench), "linlora bench"),
    ]:
        lines += [f"## `{name}`", "", inspect.cleandoc(command.help or ""), ""]
        parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
        if parameters:
            lines += ["| | default | |", "|---|---|---|"]
            lines += [f"| {_names(p)} | {_default(p)} | {_cell(getattr(p, 'help', None) or '')} |" for p in parameters]
            lines.append("")
    return "\n".join(lines)


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    if getattr(command, "invoke_without_command", False):
        yield name, command
    for part, inner in command.commands.items():
        yield from _commands(inner, f"{name} {part}")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return " ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    return "" if value is None or callable(value) or value in ((), [], "") else f"`{value}`"


def settings() -> str:
    """The keys of a recipe, from the dataclasses that read it."""
    from linlora.training.setting import explained
    from linlora.training.settings import Data, Settings

    lines = [
        "# Settings", "",
        "The keys of a recipe: the fields of `linlora.training.Settings`. Flags of `linlora train` go first.", "",
    ]  # fmt: skip
    for title, kind in (("A run", Settings), ("Under `data:`", Data)):
        lines += [f"## {title}", "", "| key | default | |", "|---|---|---|"]
        meanings = explained(kind)
        for field in dataclasses.fields(kind):
            default = field.default
            if default is dataclasses.MISSING:
                default = "required" if field.default_factory is dataclasses.MISSING else field.default_factory()
            shown = default if default in ("required", "", None) else f"`{default}`"
            lines.append(f"| `{field.name}` | {shown or ''} | {_cell(meanings[field.name])} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
