"""From the records of all runs to the numbers of the report. Everything printed or drawn is read from here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from linlora.experiments.results import mean_std
from linlora.quickstart.routing.adaptation import adaptation_record
from linlora.quickstart.routing.inventories import load_inventory, training_record
from linlora.quickstart.routing.methods import ADAPTATIONS, INVENTORIES
from linlora.quickstart.routing.workplace import Workplace, accuracy
from linlora.routing import task_weights


def collect(place: Workplace, seeds: int) -> dict[str, Any]:
    """All results as plain JSON values. Accuracies are fractions of the test split unless their key says validation."""
    reader = place.reader()
    return {
        "settings": asdict(place.settings),
        "seeds": seeds,
        "trained": [str(pair) for pair in place.trained],
        "held_out": [str(pair) for pair in place.held_out],
        "before": [accuracy(reader, place.rows(pair, "test")) for pair in place.held_out],
        "inventories": {
            inventory: inventory_results([training_record(place, inventory, seed) for seed in range(seeds)])
            for inventory in INVENTORIES
        },
        "methods": {
            method: {
                str(shots): method_results(
                    [adaptation_record(place, method, shots, seed)["tasks"] for seed in range(seeds)]
                )
                for shots in place.settings.shots
            }
            for method in ADAPTATIONS
        },
        "routing": routing_results(place),
    }


def inventory_results(records: Sequence[dict]) -> dict[str, Any]:
    """One kind of inventory over the seeds: what its training reached on the tasks it was trained on."""
    return {
        "validation": mean_std([statistics.fmean(record["validation"]) for record in records]),
        "parameters": records[0]["parameters"],
        "seconds": statistics.median(record["seconds"] for record in records),
    }


def method_results(records: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """One method and number of images: `records[seed][task]` of the held-out tasks."""
    every = [record for of_seed in records for record in of_seed]
    return {
        "test": mean_std([statistics.fmean(record["test"] for record in of_seed) for of_seed in records]),
        "validation": mean_std([statistics.fmean(record["validation"] for record in of_seed) for of_seed in records]),
        "by_task": [
            statistics.fmean(task) for task in zip(*([r["test"] for r in of_seed] for of_seed in records), strict=True)
        ],
        "parameters": every[0]["parameters"],
        "seconds": statistics.median(record["seconds"] for record in every),
    }


def routing_results(place: Workplace) -> dict[str, Any]:
    """What MHR learned of the trained tasks, seed 0: their weights in the layer where they differ most, by head and
    skill, and how alike two tasks are routed: the cosine of their weights in all layers, less the mean task's."""
    model = load_inventory(place, "mhr", 0)
    by_layer = [task_weights(model, task) for task in range(len(place.trained))]
    stacked = {layer: torch.stack([weights[layer] for weights in by_layer]).detach() for layer in by_layer[0]}
    layer = max(stacked, key=lambda name: float(stacked[name].std(0).mean()))
    every = torch.cat([weights.flatten(1) for weights in stacked.values()], 1).double()
    centered = torch.nn.functional.normalize(every - every.mean(0), dim=1)
    return {
        "layer": layer,
        "weights": stacked[layer].tolist(),
        "alike": (centered @ centered.T).tolist(),
    }


def paired_difference(results: dict, one: str, other: str, shots: int) -> dict[str, Any]:
    """The first method minus the second, seed by seed: both see the same images of the same tasks."""
    scores = [results["methods"][method][str(shots)]["test"]["by_seed"] for method in (one, other)]
    return mean_std([a - b for a, b in zip(*scores, strict=True)])
