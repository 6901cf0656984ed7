"""`linlora train`."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from linlora.commands.errors import user_errors
from linlora.training.setting import explained, values_of
from linlora.training.settings import Data, Settings

# Flags that stand for a setting, which says what it takes and what it is.
_FLAGS = {
    "model": "model", "kind": "kind", "data": "data.path", "config": "data.config", "train": "data.train",
    "validation": "data.validation", "test": "data.test", "text": "data.text", "image": "data.image",
    "label": "data.label", "prompt": "prompt", "method": "method", "head": "head", "linear_to": "linear_to",
    "seed": "seed", "lr_grid": "lr_grid", "out": "out",
}  # fmt: skip
_OF_LIBRARIES: dict[str, tuple[str, Any, str]] = {
    "rank": ("lora.r", int, "LoRA rank."),
    "alpha": ("lora.lora_alpha", float, "LoRA alpha; twice the rank if left out."),
    "dropout": ("lora.lora_dropout", float, "LoRA dropout."),
    "target": ("lora.target_modules", list[str], "layers with an adapter."),
    "learning_rate": ("training.learning_rate", float, "learning rate; the method's own if left out."),
    "steps": ("training.max_steps", int, "training steps."),
    "batch_size": ("training.per_device_train_batch_size", int, "rows in a batch, on each device."),
    "bf16": ("training.bf16", bool, "train in bfloat16."),
}
_KEYS = _FLAGS | {flag: key for flag, (key, _, _) in _OF_LIBRARIES.items()}


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these flags in place of its `**flags`, as typer reads them from its signature."""
    values = values_of(Settings) | {f"data.{name}": taken for name, taken in values_of(Data).items()}
    about = explained(Settings) | {f"data.{name}": text for name, text in explained(Data).items()}
    described = {flag: (values[key].flag, about.get(key, "")) for flag, key in _FLAGS.items()}
    described |= {flag: (kind, text) for flag, (_, kind, text) in _OF_LIBRARIES.items()}
    flags = []
    for flag, (kind, text) in described.items():
        words = text[:1].upper() + text[1:] + (" Repeatable." if kind in (list[str], list[float]) else "")
        annotation: Any = Annotated[kind | None, typer.Option(help=words)]
        flags.append(inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    together = sorted([*flags, *own], key=lambda parameter: parameter.kind)  # those by keyword alone are behind
    command.__signature__ = signature.replace(parameters=together)  # type: ignore[attr-defined]
    return command


@_with_flags
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file of settings, of one task or of many.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of a recipe of many tasks: this one (repeatable).")] = None,
    *,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting: --set training.report_to=tensorboard (repeatable)."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the run as OWNER/NAME; of many tasks, each as OWNER/NAME-TASK.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the folder and start over.")] = False,
    **flags: Any,
) -> None:
    """Train LoRA adapters, plain or linearized, of any transformers checkpoint; the same command resumes.

    Settings come from RECIPE, from flags, or both: flags go first. Everything ends up in the folder of the run: the
    adapter for stock PEFT, the task vector, a trained head, the scores, the settings and a model card.
    """
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        from linlora.commands.surroundings import offline_without_network, quiet
        from linlora.training.data import check_files

        tasks = list(_settings(recipe, task or [], _given(flags), set_ or []).values())
        for settings in tasks:
            check_files(settings.data)
        offline_without_network(name for settings in tasks for name in (settings.model, settings.data.path))
        with quiet():
            _train(tasks, fresh, push_to_hub)


def _train(tasks: Sequence[Settings], fresh: bool, repository: str | None) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from linlora.commands.hub import push
    from linlora.training import report
    from linlora.training import train as train_task
    from linlora.training.folder import is_finished
    from linlora.training.kinds import checked_task

    for settings in tasks if len(tasks) > 1 else ():
        if fresh or not is_finished(settings):
            checked_task(settings)  # of all tasks before the first one trains
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of torchrun
    runs = [train_task(settings, fresh, console) for settings in tasks]
    console.print(report.trained(runs))
    if repository is not None and PartialState().is_main_process:
        for run in runs:
            name = repository if len(runs) == 1 else f"{repository}-{run.settings.name}"
            console.print(f"uploaded to {push(run.folder, name)}", highlight=False, markup=False, soft_wrap=True)
    console.print(report.what_next(runs), highlight=False, markup=False, soft_wrap=True)
    PartialState().destroy_process_group()  # of torchrun: none of its threads runs on while the interpreter ends


def _settings(
    recipe: Path | None, tasks: list[str], flags: dict[str, Any], assignments: list[str]
) -> dict[str, Settings]:
    """The settings of all tasks; an error that comes from flags names them as they are typed."""
    from linlora.training.recipe import assigned, nested, read_recipe

    overrides = nested([*flags.items(), *assigned(assignments)])
    try:
        return read_recipe(recipe, tasks, overrides).tasks
    except ValueError as error:
        if recipe is None or _is_right_alone(recipe, tasks):
            raise ValueError(as_flags(str(error))) from None
        raise


def _is_right_alone(recipe: Path, tasks: list[str]) -> bool:
    from linlora.training.recipe import read_recipe

    try:
        read_recipe(recipe, tasks)
    except ValueError:
        return False
    return True


def as_flags(message: str) -> str:
    """A message about settings with the flags in their place.

    >>> as_flags("settings: model is missing")
    '--model is missing'
    >>> as_flags("settings: kind 'classification' needs one of the two, data.text or data.image")
    "kind 'classification' needs one of the two, --text or --image"
    >>> as_flags("settings: method is one of lora, layer, got 'full'")
    "--method is one of lora, layer, got 'full'"
    """
    message = message.removeprefix("settings: ")
    for flag, key in _KEYS.items():
        begin, end = (r"(?<![\w.])", r"(?![\w.])") if "." in key else (r"(?:^|(?<=: )|(?<=needs ))", "(?= is |$)")
        message = re.sub(begin + re.escape(key) + end, f"--{flag.replace('_', '-')}", message)
    return message


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that flags give; those left out say nothing."""
    from linlora.training.plain_yaml import parse

    given = {key: flags[flag] for flag, key in _KEYS.items() if flags[flag] not in (None, [], ())}
    return given | {key: parse(given[key]) for key in ("data.validation", "data.test") if key in given}
