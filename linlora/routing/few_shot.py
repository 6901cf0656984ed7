"""A trained inventory on a new task: train its logits alone (MHR-z), or the mean of the skills (MHR-μ)."""

from __future__ import annotations

from linlora.layers.restoring import restoring
from linlora.routing.model import RoutedModel
from linlora.routing.report import RoutedReport
from linlora.routing.selectors import Poly, Uniform


def mhr_z(model: RoutedModel, n_tasks: int = 1) -> RoutedReport:
    """Freeze everything and add `n_tasks` new tasks, whose logits train and whose ids follow the others': MHR-z.

    In place. The tasks so far route as before. (arXiv 2211.03831 trains the logits with a learning rate of 0.1.) At
    model scope `linlora.routing.fit_routing` finds weights for a new task without a learning rate.

    Raises ValueError unless every selector of the model is a Poly.

    >>> import linlora
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 3, n_skills=4, target_modules=["query"])
    >>> print(mhr_z(routed))
    linlora: 2 routed layers
         2 x query            32 -> 32, rank 16, 4 skills in 1 head, scaling 1
         2 x selector Poly(4 tasks, 4 skills in 1 head, old_tasks=3)
      backend: torch
      trainable parameters: 8 (selectors 8)
    """
    selectors = model.selector_by_name.values()
    others = sorted({type(selector).__name__ for selector in selectors if not isinstance(selector, Poly)})
    if others or not selectors:
        raise ValueError(f"mhr_z trains the logits of Poly selectors; this model has {', '.join(others) or 'none'}")
    if n_tasks < 1:
        raise ValueError(f"n_tasks is at least 1, got {n_tasks}")
    with restoring(model):
        model.requires_grad_(False)
        for selector in selectors:
            assert isinstance(selector, Poly)
            selector.add_tasks(n_tasks)
        return model.report()


def mhr_mu(model: RoutedModel) -> RoutedReport:
    """Route every row to the mean of the skills, whose copies all train, and no selector: MHR-μ, the copies kept.

    In place. `linlora.routing.collapse` makes one adapter of the mean instead, S times smaller. The gradients are the
    same; an optimizer updates copies and adapter differently (arXiv 2211.03831 keeps the copies).

    >>> import linlora
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 3, n_skills=4, target_modules=["query"])
    >>> print(mhr_mu(routed))
    linlora: 2 routed layers
         2 x query            32 -> 32, rank 16, 4 skills in 1 head, scaling 1
         2 x selector Uniform(4 skills in 1 head)
      backend: torch
      trainable parameters: 8,192 (skills 8,192)
    """
    if len(model.routed_layers) < len(model.layers):
        raise ValueError("mhr_mu averages skills; a mixture of dyadic experts has rank-one experts instead")
    if any(selector.apart for selector in model.selector_by_name.values()):
        raise ValueError(
            "mhr_mu averages skills; those of this model are adapters trained apart, which have no mean of their rank"
        )
    with restoring(model):
        for parameter in model.skills():
            parameter.requires_grad_(True)
        model.set_selectors({name: Uniform(selector.sizes) for name, selector in model.selector_by_name.items()})
        return model.report()
