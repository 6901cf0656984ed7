"""`linlora train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from linlora.commands.errors import user_errors

# Flags that are shorthands of settings: where what they say goes.
_FLAGS = {
    "model": "model", "kind": "kind", "method": "method", "head": "head", "prompt": "prompt", "seed": "seed",
    "data": "data.path", "config": "data.config", "text": "data.text", "image": "data.image", "label": "data.label",
    "train": "data.train", "validation": "data.validation", "test": "data.test",
    "rank": "lora.r", "alpha": "lora.lora_alpha", "dropout": "lora.lora_dropout", "target": "lora.target_modules",
    "learning_rate": "training.learning_rate", "steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size", "bf16": "training.bf16", "out": "out",
}  # fmt: skip


def train(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file of settings, of one task or of many.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of a recipe of many tasks: this one (repeatable).")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint: hub id or folder.")] = None,
    kind: Annotated[str | None, typer.Option(help="classification, text-to-text or zero-shot.")] = None,
    data: Annotated[str | None, typer.Option(help="Data set: hub id, folder, or csv/tsv/json/jsonl/parquet.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a data set of the hub.")] = None,
    train: Annotated[str | None, typer.Option(help="Split (or file) to train on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Split, file, or rows of train: 0.1 is a tenth.")] = None,
    test: Annotated[str | None, typer.Option(help="Split or file to test on.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Column of a text to classify (twice for pairs).")] = None,
    image: Annotated[str | None, typer.Option(help="Column of the images.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or answer.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text-to-text: columns in braces, '{question}'.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, lora-fa, layer or model.")] = None,
    head: Annotated[str | None, typer.Option(help="Head of a classifier: trained or frozen.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Layers with an adapter (repeatable).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch, on each device.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Train in bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the adapter and the order of rows.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: --set training.weight_decay=0.1 (repeatable)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; of many tasks, the folder of theirs.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in the folder and start over.")] = False,
) -> None:
    """Train LoRA adapters, plain or linearized, of any transformers checkpoint; the same command resumes.

    Settings come from RECIPE, from flags, or both: flags go first. Everything ends up in the folder of the run: the
    adapter for stock PEFT, the task vector, a trained head, the scores and the settings.
    """
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        from accelerate import PartialState
        from rich.console import Console

        from linlora.training import recipe as settings_of
        from linlora.training import report
        from linlora.training import train as train_task
        from linlora.training.folder import is_finished
        from linlora.training.kinds import checked_task
        from linlora.training.recipe import assigned, nested

        overrides = nested([*_given(context.params), *assigned(set_ or [])])
        tasks = settings_of(recipe, task or [], overrides)
        for settings in tasks.values() if len(tasks) > 1 else ():
            if fresh or not is_finished(settings):
                checked_task(settings)  # of all tasks before the first one trains
        console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of torchrun
        runs = [train_task(settings, fresh, console) for settings in tasks.values()]
        console.print(report.trained(runs))
        console.print(report.what_next(runs), highlight=False, markup=False, soft_wrap=True)
        PartialState().destroy_process_group()  # of torchrun: none of its threads runs on while the interpreter ends


def _given(flags: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that flags give; those left out say nothing."""
    from linlora.training.plain_yaml import parse

    given = {key: flags[flag] for flag, key in _FLAGS.items() if flags[flag] not in (None, [], ())}
    if "data.validation" in given:
        given["data.validation"] = parse(given["data.validation"])
    if given.get("lora.target_modules") == ["all-linear"]:
        given["lora.target_modules"] = "all-linear"
    if "out" in given:
        given["out"] = str(given["out"])
    return list(given.items())
