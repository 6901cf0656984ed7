"""The one reader of recipes: a YAML file that describes one task, or many that share most of their settings.

model: google/flan-t5-base            # shared by all
kind: text-to-text
data: {path: nyu-mll/glue, validation: 0.1, test: validation}
out: runs/glue                        # each task trains in a folder of its own there
tasks:
  rte:                                # what the task rte has of its own
    data: {config: rte}
    prompt: "{sentence1} Does it follow that {sentence2}?"
    answers: [yes, no]
experiment:                           # how `linlora compare` trains and fuses them; train and eval pass it over
  seeds: 3
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linlora.training import plain_yaml
from linlora.training.setting import SECTION
from linlora.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    Attributes:
        tasks: the settings of every task, by name.
        experiment: the section of that name, as plain values; `linlora compare` checks it.
        where: the file, for messages.
    """

    tasks: dict[str, Settings]
    experiment: dict[str, Any] = field(default_factory=dict)
    where: str = "settings"


def read_recipe(
    path: str | Path | None, tasks: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a YAML file; of some tasks where they are named.

    Args:
        path: the file; None takes the overrides alone.
        overrides: settings that go before those of the file, nested as in the file: {"training": {"max_steps": 10}}.
            The section `experiment` of them goes before that of the file.

    >>> import tempfile
    >>> shared = "{model: gpt2, kind: text-to-text, data: {path: qa.csv}, out: runs/qa, experiment: {seeds: 2}, tasks: "
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     _ = file.write(shared + "{a: {prompt: '{q}'}, b: {prompt: 'Q: {q}', seed: 1}}}")
    ...     file.flush()
    ...     found = read_recipe(file.name, overrides={"method": "model"})
    >>> [(name, s.out, s.seed, s.method) for name, s in found.tasks.items()]
    [('a', 'runs/qa/a', 0, 'model'), ('b', 'runs/qa/b', 1, 'model')]
    >>> found.experiment
    {'seeds': 2}
    """
    if path is None:
        content, overrides, where = dict(overrides or {}), {}, "settings"
    else:
        content, where = _merged(plain_yaml.read(path), overrides or {}), str(path)
    experiment = SECTION.checked(f"{where}: experiment", content.pop("experiment", {}))
    named = content.pop("tasks", None)
    if named is None:
        if tasks:
            raise ValueError(f"{where} holds one task, without a 'tasks' section; leave --task out")
        settings = Settings.from_dict(content, where)
        return Recipe({settings.name: settings}, experiment, where)
    named = SECTION.checked(f"{where}: tasks", named)
    named = {name: SECTION.checked(f"{where}: tasks.{name}", own) for name, own in named.items()}
    if not named:
        raise ValueError(f"{where}: 'tasks' names no task")
    for task in tasks:
        if task not in named:
            raise ValueError(f"{where} has no task '{task}'; its tasks are {', '.join(named)}")
    found = {}
    for name in tasks or named:
        of_task = _merged(_merged(content, named[name]), overrides or {})
        of_task.pop("experiment", None)
        of_task = {"name": name, **of_task, "out": f"{of_task.get('out', 'runs')}/{name}"}
        found[name] = Settings.from_dict(of_task, f"{where}, task '{name}'")
    return Recipe(found, experiment, where)


def recipe(
    path: str | Path | None, tasks: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> dict[str, Settings]:
    """The tasks of `read_recipe`."""
    return read_recipe(path, tasks, overrides).tasks


def assigned(assignments: Sequence[str]) -> list[tuple[str, Any]]:
    """Keys and values of flags like `--set training.max_steps=10`.

    >>> assigned(["training.learning_rate=1e-3", "lora.target_modules=[q, v]"])
    [('training.learning_rate', 0.001), ('lora.target_modules', ['q', 'v'])]
    """
    pairs = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {assignment}: expected KEY=VALUE, as in --set training.max_steps=100")
        pairs.append((key, plain_yaml.parse(value, f"--set {assignment}")))
    return pairs


def nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted keys as sections; of equal keys the last counts.

    >>> nested([("seed", 1), ("lora.r", 8), ("lora.lora_alpha", 16)])
    {'seed': 1, 'lora': {'r': 8, 'lora_alpha': 16}}
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        for part in reversed(key.split(".")):
            value = {part: value}
        content = _merged(content, value)
    return content


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` before `below`; sections are merged key by key."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
