"""A recipe: one YAML file for one task, or for many that share most of their settings.

model: google/flan-t5-base            # shared by all
kind: text-to-text
data: {path: nyu-mll/glue, validation: 0.1, test: validation}
out: runs/glue                        # each task trains in a folder of its own there
tasks:
  rte:                                # what the task rte has of its own
    data: {config: rte}
    prompt: "{sentence1} Does it follow that {sentence2}?"
    answers: [yes, no]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linlora.training import plain_yaml
from linlora.training.settings import Settings


def recipe(
    path: str | Path | None, tasks: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> dict[str, Settings]:
    """The settings of every task of a YAML file, by name; of some tasks where they are named.

    Args:
        path: the file; None takes the overrides alone.
        overrides: settings that go before those of the file, nested as in the file: {"training": {"max_steps": 10}}.

    >>> import tempfile
    >>> shared = "{model: gpt2, kind: text-to-text, data: {path: qa.csv}, out: runs/qa, tasks: "
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     _ = file.write(shared + "{a: {prompt: '{q}'}, b: {prompt: 'Q: {q}', seed: 1}}}")
    ...     file.flush()
    ...     found = recipe(file.name, overrides={"method": "model"})
    >>> [(name, s.out, s.seed, s.method) for name, s in found.items()]
    [('a', 'runs/qa/a', 0, 'model'), ('b', 'runs/qa/b', 1, 'model')]
    """
    content, where = ({}, "settings") if path is None else (plain_yaml.read(path), str(path))
    shared = {key: value for key, value in content.items() if key != "tasks"}
    named = content.get("tasks")
    if named is None:
        if tasks:
            raise ValueError(f"{where} holds one task, without a 'tasks' section; leave --task out")
        settings = Settings.from_dict(_merged(shared, overrides or {}), where)
        return {settings.name: settings}
    if not isinstance(named, Mapping) or not named or not all(isinstance(own, Mapping) for own in named.values()):
        raise ValueError(f"{where}: 'tasks' is a section with the name and the settings of each task")
    for task in tasks:
        if task not in named:
            raise ValueError(f"{where} has no task '{task}'; its tasks are {', '.join(named)}")
    found = {}
    for name in tasks or named:
        of_task = _merged(_merged(shared, named[name]), overrides or {})
        of_task = {"name": name, **of_task, "out": f"{of_task.get('out', 'runs')}/{name}"}
        found[name] = Settings.from_dict(of_task, f"{where}, task '{name}'")
    return found


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
