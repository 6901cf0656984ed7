"""Routing: layers whose adapters are mixtures of an inventory of skills, for every row by its task (arXiv 2211.03831).

    route(model, n_tasks, ...)          inventories in a model: Poly, MHR, private, shared, AdaMix, gates, MoDE
    convert(peft_poly_model)            PEFT's Poly models;     from_original: the released code's checkpoints
    linlora.linearize(routed, scope)    at the mean of the inventories, at the scope of a layer or of the model
    mhr_z, mhr_mu, collapse             a trained inventory on a new task: its logits, its mean, one adapter of it
    fit_routing, add_task               the weights of a new task by convex optimization (model scope)
    from_vectors(model, vectors)        task vectors as skills: mixed requests in one batch, gates over vectors
    export_task, merge_task             one task as a LoRA adapter, or folded into the weights

>>> import linlora
>>> base = linlora.testing.tiny_base("bert")
>>> routed = linlora.routing.route(base, n_tasks=5, n_skills=4, target_modules=["query", "value"])
>>> routed(**linlora.testing.tiny_batch("bert"), task_ids=[0, 3, 0]).logits.shape
torch.Size([3, 3])
"""

from linlora.routing.adapters import collapse, export_task, merge_task, task_weights
from linlora.routing.build import route
from linlora.routing.convert import convert
from linlora.routing.few_shot import mhr_mu, mhr_z
from linlora.routing.fit import RoutingSolution, add_task, fit_routing
from linlora.routing.gate import Gate
from linlora.routing.inventory import Centered, average, center, skill
from linlora.routing.model import RoutedModel
from linlora.routing.original import from_original
from linlora.routing.report import RoutedReport
from linlora.routing.selectors import AdaMix, Poly, Private, Selector, Sizes, Table, Uniform
from linlora.routing.vectors import from_vectors

__all__ = [
    "AdaMix", "Centered", "Gate", "Poly", "Private", "RoutedModel", "RoutedReport", "RoutingSolution", "Selector",
    "Sizes", "Table", "Uniform", "add_task", "average", "center", "collapse", "convert", "export_task", "fit_routing",
    "from_original", "from_vectors", "merge_task", "mhr_mu", "mhr_z", "route", "skill", "task_weights",
]  # fmt: skip
