"""Transformers' Trainer with the rows, the loss and the evaluation of a task, and its progress on the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, SchedulerType

from linlora.training.adapted import freeze_A
from linlora.training.evaluation import evaluate
from linlora.training.metrics import METRICS
from linlora.training.settings import Settings
from linlora.training.task import Task

# What a run does unless its settings say otherwise.
_DEFAULTS: dict[str, Any] = {
    "save_total_limit": 1,
    "logging_nan_inf_filter": False,  # a loss that is not finite shows, and is an error in the end
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every adapter takes part in every step
    "eval_strategy": "steps",
    "metric_for_best_model": "score",  # what an evaluation returns; there is no eval_loss
}


_SHOWN_ROWS = 256
"""Validation rows whose score is shown while training, where it decides nothing."""


def training_arguments(settings: Settings) -> TrainingArguments:
    """The TrainingArguments of a run. Where there is no accelerator they say so, which lets `torchrun` use gloo."""
    own: dict[str, Any] = {
        "output_dir": settings.out,
        "seed": settings.seed,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    defaults = {"use_cpu": not torch.accelerator.is_available(), **_DEFAULTS}
    if settings.training.get("lr_scheduler_type") == "reduce_lr_on_plateau":  # torch's is for a loss
        own["lr_scheduler_kwargs"] = {"mode": "max", **(settings.training.get("lr_scheduler_kwargs") or {})}
    defaults["learning_rate"] = settings.learning_rate
    defaults["save_steps"], defaults["logging_steps"] = _every(0.1, settings), _every(0.02, settings)
    defaults["eval_steps"] = _every(0.2, settings)
    try:
        arguments = TrainingArguments(**{**defaults, **settings.training, **own})
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"training: {error}") from error
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"training.report_to: {str(error).splitlines()[0]}") from error
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs; start one for each (torchrun --nproc-per-node "
            f"{arguments.n_gpu} -m linlora.cli train ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if arguments.eval_strategy != "no" and arguments.save_total_limit == 1:
        arguments.save_total_limit = 2  # the best and the last one: without the last, the end of training is forgotten
    return arguments


def check_optimizer(settings: Settings, model: torch.nn.Module) -> None:
    """Raise a ValueError for an optimizer that cannot be made: a package is missing, or another setting."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(training_arguments(settings), model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"training.optim: {str(error).splitlines()[0]}") from error


def _every(share: float, settings: Settings) -> float:
    """A share of all steps: in steps where their number is set, as the share it is where epochs are."""
    steps = settings.training.get("max_steps", 0)
    return max(1, round(share * steps)) if steps > 0 else share


class TaskTrainer(Trainer):
    """Trains the model of `adapt(task)`; evaluates by the scores of the task, as `eval_score`, `eval_accuracy`, ..."""

    def __init__(self, task: Task, model: torch.nn.Module, console: Console) -> None:
        self.task = task
        arguments = training_arguments(task.settings)
        _check_best_metric(task, arguments)
        super().__init__(
            model,
            arguments,
            data_collator=task.batch,
            train_dataset=task.rows("train"),
            eval_dataset=task.rows("validation") if arguments.eval_strategy != "no" else None,
            compute_loss_func=task.loss,
        )
        asked = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if asked and self.accelerator.distributed_type != DistributedType.FSDP:
            raise ValueError(
                "FSDP is asked for, by training.fsdp or accelerate's configuration, and would be left out here: it "
                "runs on GPUs, in the processes of torchrun or accelerate launch"
            )
        self.remove_callback(PrinterCallback)
        self.progress = ShowProgress(console, task.settings.name)
        self.add_callback(self.progress)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        shown = "eval_strategy" not in self.task.settings.training and not _decides(self.args)
        scores = evaluate(self.model, self.task, limit=_SHOWN_ROWS if shown else None, progress=False)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(scores)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that a disk is full
            reason = str(error).splitlines()[0]
            raise OSError(f"a checkpoint in {self.args.output_dir} could not be written ({reason})") from error

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """The epoch and step to begin at; behind the last epoch for a checkpoint that training ended with."""
        begin = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return begin
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self.state.best_model_checkpoint = self._best_checkpoint(checkpoint)
        return (epochs, 0) if training_ended(self.state) else begin

    def _best_checkpoint(self, checkpoint: str) -> str:
        """The best checkpoint so far, beside the last one: the folder of the run may have been renamed since."""
        best = Path(checkpoint).parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if not best.is_dir():
            raise FileNotFoundError(
                f"{best}, the best checkpoint so far, is missing, and {checkpoint} goes on from it; start over with "
                "--fresh"
            )
        return str(best)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        if self.task.settings.method == "lora-fa":  # PEFT lets all of an adapter train that it loads
            freeze_A(self.model)


def _decides(arguments: TrainingArguments) -> bool:
    """Whether training goes by its evaluations."""
    plateau = arguments.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    return plateau or arguments.load_best_model_at_end or arguments.save_strategy == SaveStrategy.BEST


def _check_best_metric(task: Task, arguments: TrainingArguments) -> None:
    """Raise a ValueError where training is to go by a score that no evaluation gives."""
    name = str(arguments.metric_for_best_model).removeprefix("eval_")
    known = ("score", *METRICS[task.answer])
    if _decides(arguments) and name not in known:
        raise ValueError(f"training.metric_for_best_model is one of {', '.join(known)}, got '{name}'")


def training_ended(state: TrainerState) -> bool:
    """Whether training was over when a checkpoint was written: all steps done, or stopped early by a callback."""
    control = state.stateful_callbacks.get("TrainerControl", {})
    return state.global_step >= state.max_steps or bool(control.get("args", {}).get("should_training_stop"))


class ShowProgress(TrainerCallback):
    """A bar with the loss and the learning rate; in a log file a line at each logging step."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[last]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.steps = self.bar.add_task(
                f"training {self.name}", total=state.max_steps, completed=state.global_step, last=""
            )
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = {name: value for name, value in logs.items() if name in ("loss", "learning_rate")}
        text = ", ".join(f"{name.replace('_', ' ')} {float(value):.4g}" for name, value in shown.items())
        if "eval_score" in logs:
            text = f"validation {100 * logs['eval_score']:.1f} % ({logs.get('eval_rows')} rows)"
        if self.bar is not None and "eval_score" not in logs:
            self.bar.update(self.steps, last=text)
        elif text:
            self.console.print(f"{self.name}: step {state.global_step} of {state.max_steps}, {text}", highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
