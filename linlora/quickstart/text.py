"""The quickstart on a pre-trained text encoder, `linlora quickstart --text`: the recipe `text.yaml`, compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants
from rich.console import Console

from linlora.experiments import compare_recipe
from linlora.experiments.environment import check_device
from linlora.experiments.jobs import Workers
from linlora.training import plain_yaml

RECIPE = Path(__file__).with_name("text.yaml")


def run(
    out: str | Path = "runs/quickstart-text",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    console: Console | None = None,
    workers: Workers = 2,
    model: str | None = None,
    tasks: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Fine-tune, fuse and compare LoRA, plain and linearized, on the tasks of the packaged recipe or on local ones.

    Arguments, result and errors are those of `linlora.experiments.compare_recipe`, and:

    Args:
        model: an encoder, by its id on the hub or its folder; the recipe's small sentence encoder if None.
        tasks: folders with files train and test, csv, json or parquet, of the columns "text" and "label"; the data sets
            of the recipe, on the hub, if there are none.

    Raises ValueError where the hub is out of reach and needed.
    """
    if device.startswith("cuda:"):
        raise ValueError(f"device '{device}': --text takes cpu or cuda; CUDA_VISIBLE_DEVICES={device[5:]} names a GPU")
    check_device(device)
    content = plain_yaml.read(RECIPE)
    content["training"] |= {"use_cpu": device == "cpu"}
    if model is not None:
        content["model"] = model
    if not (tasks and Path(content["model"]).exists()) and not constants.HF_HUB_OFFLINE:
        _reach_hub()
    if tasks:
        content["data"] |= {"train": "train", "test": "test"}
        content["tasks"] = {Path(task).resolve().name: {"data": {"path": str(task)}} for task in tasks}
        if len(content["tasks"]) < len(tasks):
            raise ValueError("two folders of --task have one name, which is that of the task; rename one")
    content["experiment"] |= {"seeds": seeds}
    return compare_recipe(None, out, fresh, content, console, workers)


def _reach_hub() -> None:
    """Raise a ValueError where the hub does not answer; its own client tries for half a minute."""
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except HTTPError:  # an answer
        pass
    except OSError as error:
        raise ValueError(
            f"{constants.ENDPOINT} is out of reach ({error}); name an encoder and tasks of yours: "
            "--model FOLDER --task FOLDER --task FOLDER"
        ) from error
