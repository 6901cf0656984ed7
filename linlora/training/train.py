"""`train`: one task from its settings to a finished folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

import linlora
from linlora.formats.export import TASK_VECTOR_FILE, export
from linlora.layers.sharding import is_sharded, whole
from linlora.storage.tensor_files import save_tensors
from linlora.training.adapted import Adapted, adapt
from linlora.training.evaluation import evaluate
from linlora.training.folder import (
    POINT_FILE,
    SETTINGS_FILE,
    Run,
    check_folder,
    is_finished,
    kept_point,
    last_checkpoint,
    only_run_in,
    write_metrics,
)
from linlora.training.head import HEAD_FILE, read_head
from linlora.training.kept_rows import check_kept, keep, rows_of
from linlora.training.kinds import checked_task
from linlora.training.settings import Settings
from linlora.training.task import Task
from linlora.training.trainer import TaskTrainer, check_optimizer, training_arguments
from linlora.vectors.task_vector import TaskVector


def train(settings: Settings, fresh: bool = False, console: Console | None = None) -> Run:
    """Train the adapter of one task, score it on its validation and test splits, and fill the folder `settings.out`.

    The same call continues an interrupted run from its last checkpoint, and returns a finished one as it is. Under
    `torchrun` or `accelerate launch` every process calls it; the first one writes.

    Args:
        fresh: delete the run of the folder, whatever its settings, and start over.
        console: where progress is printed; nowhere if None.

    Raises:
        ValueError: settings, model and data that do not go together, a run of other settings or of other rows in the
            folder, a loss that is not finite. FileExistsError: the folder holds something else, or another process
            works in it.
    """
    state = process_group(settings)
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    if state.is_main_process:
        check_folder(settings, fresh)
    state.wait_for_everyone()
    folder = Path(settings.out)
    if is_finished(settings):
        console.print(f"{settings.name}: found finished in {folder} (--fresh trains it again)", highlight=False)
        return Run.open(folder)
    task = checked_task(settings)
    rows = rows_of(task)
    check_kept(task, rows, folder)
    adapted = adapt(task, kept_point(settings))
    check_optimizer(settings, adapted.model)
    console.print(_introduction(task, adapted), highlight=False, markup=False, soft_wrap=True)
    with only_run_in(folder, state):
        if state.is_main_process:
            settings.to_yaml(folder / SETTINGS_FILE)
            keep(rows, folder)
            adapted.start.save(folder / POINT_FILE)
        trainer = TaskTrainer(task, adapted.model, console)
        begin = time.perf_counter()
        checkpoint = last_checkpoint(folder, state)
        if checkpoint is not None:
            console.print(f"{settings.name}: continuing from {checkpoint}", highlight=False)
        loss = _fit(trainer, checkpoint)
        seconds = time.perf_counter() - begin
        scores = {split: evaluate(trainer.model, task, split) for split in task.splits if split != "train"}
        _write(trainer.model, adapted.start, task, state)
        metrics = {
            "task": settings.name,
            "method": settings.method,
            "metric": task.metric,
            **scores,
            "train_loss": loss,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "continued_from": checkpoint,
            "trainable_parameters": adapted.report.trainable,
            "environment": _environment(trainer),
        }
        if state.is_main_process:
            write_metrics(folder, metrics)
        state.wait_for_everyone()
    return Run(folder, settings, metrics)


def process_group(settings: Settings) -> PartialState:
    """Join the processes of `torchrun`, over what the training arguments say; alone without it."""
    _ = training_arguments(settings).device
    return PartialState()


def _fit(trainer: TaskTrainer, checkpoint: str | None) -> float | None:
    """Train; the last loss that was logged, the mean over `logging_steps`. None if there were fewer steps."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.progress.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = float(losses[-1]) if losses else None
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    broken = [name for name, parameter in trained if not whole(parameter.detach()).isfinite().all()]
    if broken or (loss is not None and not math.isfinite(loss)):
        where = f"NaN or infinity in {broken[0]}" if broken else f"loss {loss}"
        raise ValueError(
            f"the training of {trainer.task.settings.name} diverged ({where}); choose a smaller "
            "training.learning_rate, or bf16 in place of fp16, and start over with --fresh"
        )
    return loss


def _write(model: Any, start: TaskVector, task: Task, state: PartialState) -> None:
    """The adapter for stock PEFT, the task vector, and the head."""
    folder, method = Path(task.settings.out), task.settings.method
    vector = TaskVector.from_model(model, point=start if method in ("lora", "lora-fa") else None)
    head = read_head(model)
    if method != "model" and (state.is_main_process or is_sharded(model)):
        export(model, folder)
    if not state.is_main_process:
        return
    vector.save(folder / TASK_VECTOR_FILE)
    if head:
        save_tensors(folder / HEAD_FILE, head, {"format": "linlora.head", "task": task.settings.name})


def _introduction(task: Task, adapted: Adapted) -> str:
    settings = task.settings
    counts = ", ".join(f"{len(task.rows(split))} {split}" for split in task.splits)
    notes = [f"{split}: {note}" for split, of_split in task.notes.items() for note in of_split]
    first = f"{settings.name}: {settings.kind} with {settings.model}; rows: {counts}"
    return "\n".join([first, f"labels: {task.labels_in_words()}", *notes, str(adapted.report)])


def _environment(trainer: TaskTrainer) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "datasets", "accelerate")
    device = trainer.args.device
    return {
        "linlora": linlora.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.args.world_size,
        "backend": linlora.explain("linearized_lora_linear", device).backend,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
