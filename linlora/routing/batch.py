"""Routes a batch: from task ids, or weights of the caller's, to the mixed factors of every layer.

Weights that depend on the task alone are computed once for every task that occurs, and the factors of those tasks are
mixed for all layers at once (`linlora.ops.mix_inventories`); adapters trained apart are put side by side
(`linlora.routing.side_by_side`). Where examples of one task differ, by noise in training, each layer mixes by the
example instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from linlora.ops.grouping import unique_tasks
from linlora.ops.mix_inventories import mix_inventories
from linlora.ops.routing_checks import check_task_ids
from linlora.routing.context import Factors, Routing
from linlora.routing.inventory import in_words
from linlora.routing.routed_lora_linear import RoutedLoraLinear
from linlora.routing.side_by_side import most_adapters, side_by_side

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def route_tasks(
    layers: Sequence[RoutedLoraLinear], task_ids: Tensor | Sequence[int] | None, n_tasks: int, examples: int | None
) -> Routing:
    """The routing of a batch of `examples` (None: not known) by the tasks of its examples, or of its tokens.

    Raises ValueError for missing ids where weights depend on the task, too many or too few, and ids that are no task.
    """
    device = layers[0].weight.device if layers else torch.device("cpu")
    selectors = {id(layer.selector): layer.selector for layer in layers if layer.selector.reads != "input"}
    if not any(selector.reads == "task" for selector in selectors.values()):
        one = torch.zeros(1, dtype=torch.int64, device=device)
        weights = {key: selector.weights(one) for key, selector in selectors.items()}
        return Routing(one, 1, _mix(layers, weights), {})
    ids = _checked_ids(task_ids, n_tasks, examples)
    sampling = {key for key, selector in selectors.items() if selector.samples}
    if sampling and any(layer.stream is not None for layer in layers):
        # Both streams run on mixed factors, so here every example is a group of its own.
        ids = ids.to(device)
        tasks, places, sampling = ids.flatten(), torch.arange(ids.numel(), device=device), set()
    else:
        tasks, places = unique_tasks(ids, n_tasks)
        ids, tasks, places = ids.to(device), tasks.to(device), places.to(device)
    weights = {key: selector.weights(tasks) for key, selector in selectors.items() if key not in sampling}
    drawn = {key: _rows(selectors[key].weights(ids.flatten()), ids) for key in selectors if key in sampling}
    sampled = {layer.layer_name: drawn[id(layer.selector)] for layer in layers if id(layer.selector) in drawn}
    return Routing(places.view(ids.shape), len(tasks), _mix(layers, weights), sampled)


def route_weights(layers: Sequence[RoutedLoraLinear], mixture: Tensor, examples: int | None) -> Routing:
    """The routing of a batch by the caller's weights: (examples, S), (examples, Q, S) or (examples, length, Q, S).

    On a CPU rows that agree are one group; when all do, the layers run as with a single adapter.

    Raises ValueError for weights of another number of examples, heads or skills, and, on a CPU, that are not finite.
    """
    if not layers:
        raise ValueError("mixture: this model has no inventory that weights could mix")
    device = layers[0].weight.device
    mixture = torch.as_tensor(mixture)
    if mixture.dim() not in (2, 3, 4) or not mixture.is_floating_point():
        _refuse_mixture(mixture, "floats (examples, S), (examples, Q, S) or (examples, length, Q, S) are expected")
    if examples is not None and len(mixture) != examples:
        _refuse_mixture(mixture, f"the batch has {examples} examples")
    for layer in layers:
        shape = (layer.sizes.n_heads, layer.sizes.n_skills)
        if tuple(mixture.shape[1:] if mixture.dim() == 2 else mixture.shape[-2:]) not in (shape, shape[1:]):
            _refuse_mixture(mixture, f"layer '{layer.layer_name}' has {in_words(*shape[::-1])}")
    if mixture.device.type == "cpu" and not mixture.isfinite().all():
        row = int((~mixture.isfinite()).nonzero()[0, 0])
        _refuse_mixture(mixture, f"the weights of example {row} are not finite")
    most = most_adapters(mixture) if any(layer.selector.apart for layer in layers) else 1
    lead = mixture.shape[: 2 if mixture.dim() == 4 else 1]
    rows = mixture.to(device).flatten(0, len(lead) - 1)
    places = torch.arange(len(rows), device=device)
    if device.type == "cpu" and len(rows) > 0 and not rows.requires_grad and not torch.compiler.is_compiling():
        rows, places = torch.unique(rows, dim=0, return_inverse=True)
    if rows.dim() == 2:
        rows = rows.unsqueeze(1)
    weights = {id(layer.selector): rows.to(layer.factor_dtype).expand(-1, layer.sizes.n_heads, -1) for layer in layers}
    return Routing(places.view(lead), len(rows), _mix(layers, weights, most), {})


def _rows(weights: Tensor | tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    assert isinstance(weights, Tensor)  # only weights of no task come in pairs
    return weights.unflatten(0, ids.shape)


def _mix(
    layers: Sequence[RoutedLoraLinear], weights: Mapping[int, Tensor | tuple[Tensor, Tensor]], most: int = 1
) -> dict[str, Factors]:
    """The mixed factors, by layer name, of the layers whose selector has weights here.

    One call a device mixes; a layer whose skills are adapters trained apart, at most `most` of them a row, has its own.
    """
    factors: dict[str, Factors] = {}
    mixed = []
    for layer in (layer for layer in layers if id(layer.selector) in weights):
        if not layer.selector.apart:
            mixed.append(layer)
            continue
        assert layer.lora_A is not None  # apart: not linearized, and in one head
        of_layer, _ = _pair(weights[id(layer.selector)], layer.weight.device)
        factors[layer.layer_name] = Factors(*side_by_side(layer.lora_A, layer.lora_B, of_layer, most))
    for device in {layer.weight.device for layer in mixed}:
        here = [layer for layer in mixed if layer.weight.device == device]
        for_A, for_B = zip(*(_pair(weights[id(layer.selector)], device) for layer in here), strict=True)
        As, Bs = mix_inventories([layer.lora_A for layer in here], [layer.lora_B for layer in here], for_A)
        if any(a is not b for a, b in zip(for_A, for_B, strict=True)):
            Bs = mix_inventories([None] * len(here), [layer.lora_B for layer in here], for_B)[1]
        names = [layer.layer_name for layer in here]
        factors.update({name: Factors(A, B) for name, A, B in zip(names, As, Bs, strict=True)})
    return factors


def _pair(weights: Tensor | tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights of A and of B, the same tensor where they are the same."""
    if isinstance(weights, tuple):
        return weights[0].to(device), weights[1].to(device)
    weights = weights.to(device)
    return weights, weights


def _checked_ids(task_ids: Tensor | Sequence[int] | None, n_tasks: int, examples: int | None) -> Tensor:
    known = f"the ids of the {n_tasks} tasks are 0 to {n_tasks - 1}"
    if task_ids is None:
        raise ValueError(
            f"task_ids are missing: this model routes by task, so pass task_ids=, the task of every example ({known}), "
            "or mixture=, weights of your own"
        )
    ids = torch.as_tensor(task_ids)
    if ids.numel() == 0:
        ids = ids.long()  # an empty list makes floats
    if ids.dtype not in INTEGERS or ids.dim() not in (1, 2):
        raise ValueError(
            f"task_ids: integers (examples,), or (examples, length) for every token, are expected, got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    if examples is not None and len(ids) != examples:
        raise ValueError(f"task_ids: got {len(ids)} of them for a batch of {examples} examples")
    check_task_ids(ids.long().flatten(), n_tasks, "task_ids")
    return ids.long()


def _refuse_mixture(mixture: Tensor, why: str) -> NoReturn:
    raise ValueError(f"mixture: got {mixture.dtype} {tuple(mixture.shape)}; {why}")
