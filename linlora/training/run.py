"""`train`: one task from its settings to a finished folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

import linlora
from linlora.formats.export import export
from linlora.formats.model_config import write_model_config
from linlora.formats.vector_folder import save_beside
from linlora.layers.sharding import is_sharded, whole
from linlora.storage.environment import environment
from linlora.storage.run_directory import TRAINING_FILE, write_json
from linlora.storage.tensor_files import save_tensors
from linlora.training.adapted import Adapted, adapt
from linlora.training.card import write_card
from linlora.training.evaluation import evaluate
from linlora.training.folder import (
    GRID_FOLDER,
    METRICS_FILE,
    POINT_FILE,
    Run,
    check_folder,
    is_finished,
    kept_point,
    last_checkpoint,
    only_run_in,
    processes_of,
)
from linlora.training.head import HEAD_FILE, read_head
from linlora.training.kept_rows import checked_rows, keep
from linlora.training.kinds import checked_task, load_task
from linlora.training.settings import Settings
from linlora.training.similarity import Similarity
from linlora.training.task import Task
from linlora.training.trainer import TaskTrainer, check_optimizer, training_arguments
from linlora.vectors.task_vector import TaskVector

PROTOTYPES_FILE = "prototypes.safetensors"


def train(settings: Settings, fresh: bool = False, console: Console | None = None) -> Run:
    """Train the adapter of one task, score it on its validation and test splits, and fill the folder `settings.out`.

    The same call continues an interrupted run from its last checkpoint, and returns a finished one as it is; a test
    split that the settings name and the finished run has no scores of is scored and added. Under `torchrun` or
    `accelerate launch` every process calls it; the first one writes.

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
    if is_finished(settings):
        return _finished(settings, state, console)
    if settings.lr_grid:
        return _best_of_grid(settings, state, console)
    return _train(settings, state, console, ("validation", "test"))


def process_group(settings: Settings) -> PartialState:
    """Join the processes of `torchrun`, over what the training arguments say; alone without it."""
    _ = training_arguments(settings).device
    return PartialState()


def _train(settings: Settings, state: PartialState, console: Console, scored: Sequence[str]) -> Run:
    folder = Path(settings.out)
    task = checked_task(settings)
    rows = checked_rows(task, folder)
    adapted = adapt(task, kept_point(settings))
    check_optimizer(settings, adapted.model)
    console.print(_introduction(task, adapted), highlight=False, markup=False, soft_wrap=True)
    with only_run_in(folder, state):
        if state.is_main_process:
            settings.to_yaml(folder / TRAINING_FILE)
            keep(rows, folder)
            adapted.start.save(folder / POINT_FILE)
        trainer = TaskTrainer(task, adapted.model, console)
        begin = time.perf_counter()
        checkpoint = last_checkpoint(folder, state)
        if checkpoint is not None:
            console.print(f"{settings.name}: continuing from {checkpoint}", highlight=False)
            if (before := processes_of(checkpoint)) != state.num_processes:
                now = f"{before} processes began this run and {state.num_processes} go on: a step takes other rows"
                console.print(f"{settings.name}: {now}", highlight=False)
        loss = _fit(trainer, checkpoint)
        seconds = time.perf_counter() - begin
        scores = {split: evaluate(trainer.model, task, split) for split in task.splits if split in scored}
        _write(trainer.model, adapted.start, task, state)
        metrics = {
            "task": settings.name,
            "method": settings.method,
            "metric": task.metric,
            **scores,
            "learning_rate": settings.learning_rate,
            "train_loss": loss,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "continued_from": checkpoint,
            "trainable_parameters": adapted.report.trainable,
            "environment": _environment(trainer),
        }
        _finish(Run(folder, settings, metrics), state, task)
    return Run(folder, settings, metrics)


def _finish(run: Run, state: PartialState, task: Task) -> None:
    """Write what is written last."""
    if state.is_main_process:
        run.settings.to_yaml(run.folder / TRAINING_FILE)
        write_card(run, task)
        write_json(run.folder / METRICS_FILE, run.metrics)
    state.wait_for_everyone()


def _finished(settings: Settings, state: PartialState, console: Console) -> Run:
    """A finished run as it is, or with the scores of a test split that was named since."""
    run = Run.open(settings.out)
    named = settings.data.test
    if not named or ("test" in run.metrics and named == run.settings.data.test):
        console.print(f"{settings.name}: found finished in {run.folder} (--fresh trains it again)", highlight=False)
        return run if settings.name == run.settings.name else _renamed(run, settings.name, state)
    task = load_task(settings)
    task.check("test")
    console.print(f"{settings.name}: found finished in {run.folder}; scoring it on '{named}'", highlight=False)
    for note in task.notes["test"]:
        console.print(f"test: {note}", highlight=False, markup=False, soft_wrap=True)
    with only_run_in(run.folder, state):
        scores = evaluate(run.model(task), task, "test")
        if state.is_main_process:  # before the settings change, beside which these would be scores of the new split
            write_json(run.folder / METRICS_FILE, {key: of for key, of in run.metrics.items() if key != "test"})
        named_now = replace(run.settings, data=settings.data, name=settings.name)
        run = Run(run.folder, named_now, {**run.metrics, "task": settings.name, "test": scores})
        _finish(run, state, task)
    return run


def _renamed(run: Run, name: str, state: PartialState) -> Run:
    """A finished run under another name."""
    with only_run_in(run.folder, state):
        run = Run(run.folder, replace(run.settings, name=name), {**run.metrics, "task": name})
        _finish(run, state, load_task(run.settings))
    return run


def _best_of_grid(settings: Settings, state: PartialState, console: Console) -> Run:
    """A run for each learning rate in a folder of its own; the one that validates best becomes the run."""
    folder, tried = Path(settings.out), {}
    task = checked_task(settings)
    rows = checked_rows(task, folder)
    with only_run_in(folder, state):
        if state.is_main_process:
            settings.to_yaml(folder / TRAINING_FILE)
            keep(rows, folder)
        for rate in settings.lr_grid:
            out, training = str(folder / GRID_FOLDER / str(rate)), {"learning_rate": rate}
            of_rate = settings.changed(lr_grid=(), out=out, training=training)
            if state.is_main_process:
                check_folder(of_rate)
            state.wait_for_everyone()
            console.print(f"{settings.name}: learning rate {rate}", highlight=False)
            try:
                found = is_finished(of_rate)
                tried[rate] = Run.open(out) if found else _train(of_rate, state, console, ("validation",))
            except DivergedError as error:
                console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        if not tried:
            raise DivergedError(f"the training of {settings.name} diverged at every learning rate of lr_grid")
        scores = {rate: run.metrics["validation"]["score"] for rate, run in tried.items()}
        best = max(scores, key=lambda rate: scores[rate])  # of equal ones the smallest
        listed = ", ".join(f"{rate}: {100 * score:.1f}" for rate, score in scores.items())
        console.print(f"{settings.name}: validation % by learning rate {listed}; {best} is kept", highlight=False)
        if state.is_main_process:
            tried[best].copy_to(folder)
        state.wait_for_everyone()
        metrics = {
            **tried[best].metrics,
            "task": settings.name,
            "lr_grid": {str(rate): score for rate, score in scores.items()},
        }
        run = Run(folder, settings, metrics)
        if "test" in task.splits:
            run = Run(folder, settings, {**metrics, "test": evaluate(run.model(task), task, "test")})
        _finish(run, state, task)
        if state.is_main_process:
            shutil.rmtree(folder / GRID_FOLDER)
    return run


class DivergedError(ValueError):
    """The loss or a trained value is not finite; the message says what to change."""


def _fit(trainer: TaskTrainer, checkpoint: str | None) -> float | None:
    """Train; the last loss that was logged, the mean over `logging_steps`. None if there were fewer steps."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.progress.close()
    if not trainer.state.global_step:
        raise ValueError(
            f"{trainer.task.settings.name} made no step of training: its {len(trainer.train_dataset)} rows fill no "
            "batch, and training.dataloader_drop_last leaves out one that is not full"
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = float(losses[-1]) if losses else None
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    broken = [name for name, parameter in trained if not whole(parameter.detach()).isfinite().all()]
    if broken or (loss is not None and not math.isfinite(loss)):
        where = f"NaN or infinity in {broken[0]}" if broken else f"loss {loss}"
        raise DivergedError(
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
    if head:
        write_model_config(model.get_base_model(), folder)
        save_tensors(folder / HEAD_FILE, head, {"format": "linlora.head", "task": task.settings.name})
    if isinstance(task, Similarity):
        held = {"prototypes": task.head.prototypes, "centre": task.head.centre}
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        metadata = {"format": "linlora.prototypes", "classes": json.dumps(list(task.classes.names))}
        save_tensors(folder / PROTOTYPES_FILE, kept, metadata)
    save_beside(vector, folder)


def _introduction(task: Task, adapted: Adapted) -> str:
    settings = task.settings
    counts = ", ".join(f"{len(task.rows(split))} {split}" for split in task.splits)
    notes = [f"{split}: {note}" for split, of_split in task.notes.items() for note in of_split]
    first = f"{settings.name}: {settings.kind} with {settings.model}; rows: {counts}"
    if settings.method == "model":
        notes.append(f"linearized as a whole up to the {settings.ends_at}")
    return "\n".join([first, f"labels: {task.labels_in_words()}", *notes, str(adapted.report)])


def _environment(trainer: TaskTrainer) -> dict[str, Any]:
    device = trainer.args.device
    return {
        **environment(device),
        "processes": trainer.args.world_size,
        "backend": linlora.explain("linearized_lora_linear", device).backend,
    }
