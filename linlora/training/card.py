"""The model card of a run, README.md: what the adapter is, what it was trained on, its scores, how it is loaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from linlora.formats import Stored
from linlora.formats.model_config import FOLDER
from linlora.storage.files import write_text
from linlora.storage.run_directory import TRAINING_FILE
from linlora.training.folder import Run
from linlora.training.head import HEAD_FILE
from linlora.training.settings import Settings
from linlora.training.similarity import Similarity
from linlora.training.task import Task

_FAMILIES = {
    "lora": "A LoRA adapter",
    "lora-fa": "A LoRA adapter whose A was frozen (LoRA-FA)",
    "layer": "A LoRA adapter, linearized layer by layer around its starting point (layer scope)",
    "model": "A task vector of a network that was linearized as a whole around its starting point (model scope)",
}


def write_card(run: Run, task: Task) -> None:
    """Write the card into the folder of the run; one that was written by hand is left alone."""
    path = run.folder / "README.md"
    there = path.read_text("utf-8", errors="replace") if path.exists() else _MARK
    if _MARK in there or "[More Information Needed]" in there:  # the empty form that PEFT writes
        write_text(path, card(run, task))


_MARK = "linlora train"


def card(run: Run, task: Task) -> str:
    """The text of a card, with the metadata that the hub reads."""
    settings, metrics = run.settings, run.metrics
    front = ModelCardData(
        base_model=settings.model,
        library_name="peft" if settings.method != "model" else "linlora",
        tags=["lora", "linlora", settings.kind],
        datasets=[path] if (path := settings.data.path) and _is_of_the_hub(path) else None,
        model_name=settings.name,
        eval_results=_results(run),
    )
    lora = settings.lora
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {settings.name}",
        f"{_FAMILIES[settings.method]}, of `{settings.model}`: rank {lora['r']}, alpha {lora['lora_alpha']}, "
        f"{metrics['trainable_parameters']:,} trained values. Made by `{_MARK}`; `{TRAINING_FILE}` makes it again.",
        f"## Task\n\n{settings.kind.capitalize()}: {task.labels_in_words()}. Trained on {_source(settings)}, "
        f"{len(task.rows('train'))} rows, {metrics['steps']} steps at the learning rate {metrics['learning_rate']:g}, "
        f"seed {settings.seed}.",
        _scores(run),
        f"## Use\n\n```python\n{_code(run, task)}\n```",
    ]
    if run.head is not None:
        sections.append(f"`{HEAD_FILE}` holds the head that was trained beside it, `{FOLDER}/config.json` its classes.")
    return "\n\n".join(sections) + "\n"


def _scores(run: Run) -> str:
    lines = ["## Scores", "", "| split | rows | score |", "|---|---|---|"]
    for split in ("validation", "test"):
        if split in run.metrics:
            scores = run.metrics[split]
            all_of = ", ".join(
                f"{name} {100 * value:.1f} %" for name, value in scores.items() if name not in ("score", "rows")
            )
            lines.append(f"| {split} | {scores['rows']} | {all_of} |")
    lines += ["", f"It is judged by {run.metrics['metric']}."]
    return "\n".join(lines)


def _results(run: Run) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=run.settings.kind,
            dataset_type=run.settings.data.path or run.settings.data.train,
            dataset_name=run.settings.name,
            dataset_split=split,
            metric_type=run.metrics["metric"],
            metric_value=round(run.metrics[split]["score"], 4),
        )
        for split in ("validation", "test")
        if split in run.metrics
    ]


def _code(run: Run, task: Task) -> str:
    settings = run.settings
    if settings.method == "model":
        return (
            "import linlora\nfrom linlora.training import Run, load_task\n\n"
            'run = Run.open("FOLDER")  # this one\nmodel = run.model(load_task(run.settings))'
        )
    kind = task.auto.__name__
    if run.head is not None:
        return (
            f"from peft import PeftModel\nfrom transformers import AutoConfig, {kind}\n\n"
            f'config = AutoConfig.from_pretrained("FOLDER", subfolder="{FOLDER}")  # this one\n'
            f'base = {kind}.from_pretrained("{settings.model}", config=config, ignore_mismatched_sizes=True)\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        )
    note = "  # scores: normalise(features - centre) @ prototypes.T, of prototypes.safetensors"
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{settings.model}")\n'
        f'model = PeftModel.from_pretrained(base, "FOLDER")  # this one{note if isinstance(task, Similarity) else ""}'
    )


def _source(settings: Settings) -> str:
    data = settings.data
    where = data.path or data.train
    name = where if _is_of_the_hub(where) else Path(where).name
    return f"`{name}`" + (f" ({data.config})" if data.config else "")


def _is_of_the_hub(path: str) -> bool:
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def write_card_of_export(stored: Stored, out: Path, base_model: str | None, cast: str | None) -> None:
    """Write the card of an exported adapter: that of the run it comes from, or what its vector says."""
    path, own = out / "README.md", stored.path / "README.md"
    if cast is None and own.is_file() and _MARK in own.read_text("utf-8", errors="replace"):
        write_text(path, own.read_text("utf-8"))
        return
    front = ModelCardData(base_model=base_model, library_name="peft", tags=["lora", "linlora"])
    base = f"`{base_model}`" if base_model else "a base model that it does not name"
    note = " Its values are of model scope; as an adapter they are another function." if cast else ""
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {out.name}",
        f"A LoRA adapter of {base}, {len(stored.vector.scalings)} layers: {stored.kind} `{stored.path.name}`, written "
        f"by `linlora export`.{note}",
        "## Use\n\n```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base, "FOLDER")  # this one\n```',
    ]
    write_text(path, "\n\n".join(sections) + "\n")
