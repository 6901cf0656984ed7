"""Training and evaluation of adapters on real checkpoints and data sets: what `linlora train` and `linlora eval` run.

    settings = Settings.from_yaml("rte.yaml")       one task; recipe(path) reads a file of many
    run = train(settings)                           a folder with adapter, task vector, head and metrics
    task = load_task(settings)                      its data set, and what a model has to do with it
    model = adapt(task, point=run.vector).model     the base model with the adapter at its linearization point
    linlora.apply(model, run.vector)                this vector, or one fused of several
    evaluate(model, task, "test")["score"]

A classifier's head is not part of the vector: `set_head(model, run.head)` puts it into the model. `Suite` does all of
this for many tasks on one model, and has what LoraHub and AdaMerging ask for.

`__init__.pyi` lists the public names. Each is imported when it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

from linlora.training.recipe import recipe as recipe  # noqa: E402  (before the module of that name is asked for)
