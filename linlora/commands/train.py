"""`linlora train`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linlora.commands.errors import user_errors
from linlora.training.settings import ENDS, FAMILIES, HEADS, KINDS

if TYPE_CHECKING:
    from linlora.training import Settings

# Flags that are shorthands of settings: where what they say goes.
_FLAGS = {
    "model": "model", "kind": "kind", "method": "method", "head": "head", "linear_to": "linear_to", "prompt": "prompt",
    "seed": "seed", "data": "data.path", "config": "data.config", "text": "data.text", "image": "data.image",
    "label": "data.label", "train": "data.train", "validation": "data.validation", "test": "data.test",
    "rank": "lora.r", "alpha": "lora.lora_alpha", "dropout": "lora.lora_dropout", "target": "lora.target_modules",
    "learning_rate": "training.learning_rate", "lr_grid": "lr_grid", "steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size", "bf16": "training.bf16", "out": "out",
}  # fmt: skip


def train(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file of settings, of one task or of many.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of a recipe of many tasks: this one (repeatable).")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint: hub id or folder.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"{', '.join(KINDS)}.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set: hub id, folder, or csv/tsv/json/jsonl/parquet.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a data set of the hub.")] = None,
    train: Annotated[str | None, typer.Option(help="Split (or file) to train on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Split, file, or rows of train: 0.1 is a tenth.")] = None,
    test: Annotated[str | None, typer.Option(help="Split or file to test on; a split 'test' is found.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Column of a text to classify (twice for pairs).")] = None,
    image: Annotated[str | None, typer.Option(help="Column of the images.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or answer.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text-to-text: columns in braces, '{question}'.")] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(FAMILIES)}.")] = None,
    head: Annotated[str | None, typer.Option(help=f"Head of a classifier: {', '.join(HEADS)}.")] = None,
    linear_to: Annotated[
        str | None, typer.Option(help=f"At model scope, with prototypes or zero-shot, linear up to: {', '.join(ENDS)}.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Layers with an adapter (repeatable).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate; the method's if left out.")] = None,
    lr_grid: Annotated[
        list[float] | None, typer.Option(help="Try this learning rate (repeatable); validation chooses.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch, on each device.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Train in bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the adapter and the order of rows.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: --set training.report_to=tensorboard (repeatable)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; of many tasks, the folder of theirs.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the run as OWNER/NAME; of many tasks, each as OWNER/NAME-TASK.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the folder and start over.")] = False,
) -> None:
    """Train LoRA adapters, plain or linearized, of any transformers checkpoint; the same command resumes.

    Settings come from RECIPE, from flags, or both: flags go first. Everything ends up in the folder of the run: the
    adapter for stock PEFT, the task vector, a trained head, the scores, the settings and a model card.
    """
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        from linlora.commands.surroundings import offline_without_network, quiet
        from linlora.training.data import check_files

        tasks = list(_settings(recipe, task or [], _given(context.params), set_ or []).values())
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

    >>> as_flags("settings: 'model' is missing")
    '--model is missing'
    >>> as_flags("settings: kind 'classification' needs one of the two, data.text or data.image")
    '--kind classification needs one of the two, --text or --image'
    >>> as_flags("settings: unknown method 'full'; choose one of lora, layer")
    "--method: unknown method 'full'; choose one of lora, layer"
    """
    message = message.removeprefix("settings: ")
    for flag, key in _FLAGS.items():
        name = f"--{flag.replace('_', '-')}"
        if "." in key:
            message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.])", name, message)
        else:
            message = message.replace(f"'{key}' is missing", f"{name} is missing")
            message = re.sub(rf"(^|: )unknown {key} '", rf"\1{name}: unknown {key} '", message)
    message = re.sub(r"\bkind '([\w-]+)' needs", r"--kind \1 needs", message).replace("needs prompt", "needs --prompt")
    return message.replace("'data' is missing", "--data is missing")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that flags give; those left out say nothing."""
    from linlora.training.plain_yaml import parse

    given = {key: flags[flag] for flag, key in _FLAGS.items() if flags[flag] not in (None, [], ())}
    given |= {key: parse(given[key]) for key in ("data.validation", "data.test") if key in given}
    if given.get("lora.target_modules") == ["all-linear"]:
        given["lora.target_modules"] = "all-linear"
    if "out" in given:
        given["out"] = str(given["out"])
    return given
