"""The registry of fusion methods, and `fuse`, which calls one by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from linlora.fusion.adamerging import adamerging
from linlora.fusion.arithmetic import average, negation, task_arithmetic
from linlora.fusion.checks import check_options, required
from linlora.fusion.compress import compress_then_merge
from linlora.fusion.dare import dare
from linlora.fusion.knots import knots_ties
from linlora.fusion.lorahub import lorahub
from linlora.fusion.regmean import regmean
from linlora.fusion.soup import soup
from linlora.fusion.spectral import iso_c, iso_cts, tsv, wudi_minimiser
from linlora.fusion.ties import ties
from linlora.vectors.task_vector import TaskVector

IN_WEIGHT_SPACE: dict[str, Callable[..., TaskVector]] = {
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "knots_ties": knots_ties,
    "compress_then_merge": compress_then_merge,
    "wudi_minimiser": wudi_minimiser,
    "soup": soup,
}
"""The methods of vectors in weight space alone."""

METHODS: dict[str, Callable[..., TaskVector]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "negation": negation,
    "lorahub": lorahub,
    "adamerging": adamerging,
    "regmean": regmean,
    **IN_WEIGHT_SPACE,
}

Needs = Literal["nothing", "inputs", "examples"]


def needs(method: str) -> Needs:
    """Names what a method needs beside the vectors: nothing, unlabeled inputs of the tasks, or labeled examples.

    It says so by options without a default: `inputs`, and for AdaMerging `model`; or, where it learns from examples,
    `objective` for LoraHub, `model` and `batches` for LoRA-Soups.

    >>> needs("tsv"), needs("regmean"), needs("soup")
    ('nothing', 'inputs', 'examples')
    """
    options = required(METHODS[method])
    return "inputs" if "inputs" in options else "examples" if options else "nothing"


FROM_VECTORS = tuple(method for method in METHODS if needs(method) == "nothing")
"""The methods that need nothing but the vectors: no model, no data."""


def fuse(vectors: Iterable[TaskVector], method: str = "task_arithmetic", **options: Any) -> TaskVector:
    """Fuse task vectors by one of `linlora.fusion.METHODS`; the options are the method's keyword arguments.

    Args:
        vectors: task vectors of one scope, set of layers and linearization point; or in weight space, of one base
            model, whatever their ranks, scalings and layers. In a list; from a generator that loads one after the
            other, of which methods that go through them once hold one at a time; or left in files, a list of
            `TaskVector.open`: then the result is lazy, each of its tensors computed when it is asked for, and `save`
            streams with a few tensors in memory.
        method: of vectors of one point and in weight space "average", "task_arithmetic", "negation", "lorahub" and
            "regmean"; of one point alone "ties", "dare" and "adamerging"; in weight space alone "tsv", "iso_c",
            "iso_cts", "knots_ties", "compress_then_merge", "wudi_minimiser" and "soup". `needs(method)` says which want
            inputs or examples. In weight space most take `out_rank=r` or `energy=0.99`: the best adapter of a smaller
            rank, whose `truncation_error` says what part of the norm was cut off.

    Returns: a TaskVector of the same point and scope, in dtypes that hold those of all; sums are accumulated in float32
        (float64 for float64 vectors) and rounded once. The order of a list changes no bit (of DARE, the masks). A
        method sees vectors, not models, so it works at scopes "lora", "layer" and "model" alike. In weight space it
        sees ΔW, and the result has the rank of all vectors together unless it is cut.

    Raises ValueError for no vectors, an unknown method, options the method does not take or cannot use, values that are
    not finite or become so; DifferentPointError for vectors of different points, scopes, layers or base models.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> vector = linlora.TaskVector.from_model(model)
    >>> linlora.fuse([vector, vector], "task_arithmetic", scaling=0.5).norm()
    0.0
    >>> linlora.fuse([vector], "ties", scale=2.0)
    Traceback (most recent call last):
    ValueError: ties takes no option 'scale'; its options are keep, scaling
    """
    if method not in METHODS:
        raise ValueError(f"fuse: unknown method {method!r}; choose one of {', '.join(METHODS)}")
    check_options(method, METHODS[method], options)
    return METHODS[method](vectors, **options)
