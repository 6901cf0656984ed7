"""Training and evaluation of adapters on real checkpoints and data sets: what `linlora train` and `linlora eval` run.

    settings = Settings.from_yaml("rte.yaml")       one task; recipe(path) reads a file of many
    run = train(settings)                           a folder with adapter, task vector, head and metrics
    task = load_task(settings)                      its data set, and what a model has to do with it
    model = adapt(task, point=run.vector).model     the base model with the adapter at its linearization point
    linlora.apply(model, run.vector)                this vector, or one fused of several
    evaluate(model, task, "test")["score"]

A classifier's head is not part of the vector: `set_head(model, run.head)` puts it into the model. `Suite` does all of
this for many tasks on one model, and has what LoraHub and AdaMerging ask for.
"""

from linlora.training.adapted import Adapted, adapt
from linlora.training.evaluation import evaluate
from linlora.training.folder import Run
from linlora.training.head import read_head, set_head
from linlora.training.kinds import load_task
from linlora.training.recipe import Recipe, read_recipe, recipe
from linlora.training.settings import Data, Settings
from linlora.training.suite import Suite
from linlora.training.task import Task
from linlora.training.train import train

__all__ = [
    "Adapted",
    "Data",
    "Recipe",
    "Run",
    "Settings",
    "Suite",
    "Task",
    "adapt",
    "evaluate",
    "load_task",
    "read_head",
    "read_recipe",
    "recipe",
    "set_head",
    "train",
]
