"""The suites: which cases a run measures, the most telling first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .cases import Case, Phase, attention_case, dual_case, layer_case, model_case, routing_case, stream_case
from .shapes import LAYERS

_PHASES: tuple[Phase, ...] = ("forward", "forward_backward")
_ATTENTION: tuple[tuple[bool, Phase], ...] = ((False, "forward"), (True, "forward_backward"))


def suite(name: str) -> list[Case]:
    """The cases of a named suite. Raises ValueError for a name that does not exist."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: choose one of {', '.join(SUITES)}")
    return SUITES[name]()


def select(
    cases: Iterable[Case], dtype: str | None = None, ranks: Iterable[int] = (), filters: Iterable[str] = ()
) -> list[Case]:
    """The cases in another dtype and at other ranks, of which only those stay whose id holds every filter."""
    chosen = [replace(case, dtype=dtype) if dtype else case for case in cases]
    if ranks := tuple(ranks):
        chosen = [replace(case, rank=rank if case.rank else 0) for case in chosen for rank in ranks]
    unique = dict.fromkeys(chosen)
    return [case for case in unique if all(text in case.id for text in filters)]


def _quick() -> list[Case]:
    return [
        layer_case("tiny", "linear", 4, "short", "forward"),
        layer_case("tiny", "linear", 4, "pair"),
        layer_case("flan-t5-base", "q", 128, "short"),
        layer_case("flan-t5-base", "q", 128, "pair"),
        dual_case("flan-t5-base", "q", 128),
        attention_case("bert", 1, 2, 64, 32, causal=False),
        routing_case("flan-t5-base", "q", 8, 16, 4),
    ]


def _default() -> list[Case]:
    """What a laptop does in three minutes, the most telling first: a slow machine runs out of time at the end."""
    main = ("flan-t5-large", "q", 2048)
    return [
        layer_case(*main, "short", "forward"),
        layer_case(*main, "short"),
        layer_case(*main, "pair"),
        layer_case("tiny", "linear", 1, "short", "forward"),
        layer_case("tiny", "linear", 4, "pair", "forward"),
        layer_case("tiny", "linear", 4, "short"),
        layer_case("llama-3-8b", "q", 1, "short", "forward"),
        layer_case("qwen-2.5-7b", "k", 64, "pair", "forward"),
        *(attention_case("t5-small", 2, 8, 512, 64, causal, phase) for causal, phase in _ATTENTION),
        model_case("llama-2x512", scope="model"),
        model_case("bert-6x384", scope="model"),
        model_case("bert-4x256"),
        routing_case("flan-t5-base", "q", 16, 128, 8),
        routing_case("flan-t5-base", "q", 256, 4, 64, "skewed"),
        *(layer_case(*main, "short", rank=rank) for rank in (4, 128)),
        layer_case("flan-t5-base", "wi", 512, "pair"),
        dual_case("flan-t5-large", "q", 1024),
    ]


def _small_m() -> list[Case]:
    """Inference and short batches: bound by launches and by reading W."""
    layers = (("llama-3-8b", "q"), ("llama-3-8b", "down"), ("qwen-2.5-7b", "k"), ("flan-t5-xl", "wi"))
    return [
        layer_case(*layer, M, form, "forward")
        for layer in layers
        for M in (1, 4, 16, 64, 256)
        for form in ("short", "pair")
    ]


def _gpu() -> list[Case]:
    """The shapes that prove a backend first, then where it may lose: what `make gpu-check` runs."""
    main = ("llama-3-8b", "q", 8192)
    large = [
        *(layer_case(*main, form, phase) for form in ("short", "pair") for phase in _PHASES),
        *(dual_case(*main, phase) for phase in _PHASES),
        *(layer_case(*main, form, "input_gradient") for form in ("short", "pair")),
        dual_case(*main, "input_gradient"),
        *(replace(layer_case(*main, form), dropout=0.1) for form in ("short", "pair")),
        replace(dual_case(*main), dropout=0.1),
        *(layer_case("llama-3-8b", name, 8192, "pair") for name in ("k", "up", "down")),
        *(layer_case("qwen-2.5-7b", name, 8192, "short") for name in ("q", "up")),
        layer_case("qwen-2.5-7b", "down", 4096, "pair"),
        layer_case("llama-3-8b", "q", 16384, "pair"),
        *(layer_case("flan-t5-xl", name, 4096, "short") for name in ("q", "wi", "wo")),
        dual_case("flan-t5-xl", "q", 4096),
    ]
    ranks = [layer_case(*main, "pair", phase, rank) for rank in (4, 64, 128) for phase in _PHASES]
    middle = [
        layer_case("clip-vit-b16", "q", 197 * 64, "pair"),
        layer_case("clip-vit-b16", "fc1", 197 * 64, "short"),
        layer_case("flan-t5-base", "wi", 2048, "pair"),
        layer_case("flan-t5-base", "q", 512, "short"),
        layer_case("qwen-2.5-7b", "k", 512, "pair"),
    ]
    small = [layer_case("llama-3-8b", "q", M, "short", "forward") for M in (1, 16, 128, 512)]
    small += [layer_case("llama-3-8b", "q", M, "pair", "forward") for M in (16, 128)]
    small += [layer_case("llama-3-8b", "down", 1, "pair", "forward"), dual_case("llama-3-8b", "q", 16, "forward")]
    models = [
        *(model_case(name, scope="model") for name in ("llama-1x4096", "bert-12x768")),
        *(model_case(name) for name in ("bert-12x768", "vit-12x768")),
    ]
    return [*large, *_gpu_streams(), *_gpu_routing(), *models, *ranks, *middle, *small]


def _gpu_streams() -> list[Case]:
    """Every op of model scope at the shapes of a Llama and a BERT."""
    long = [
        attention_case(model, 4, 32, 4096, size, causal, phase)
        for model, size in (("llama-3-8b", 128), ("flan-t5-xl", 64))
        for causal in (True, False)
        for phase in _PHASES
    ]
    return [
        *long,
        attention_case("llama-3-8b", 1, 32, 4096, 128, causal=True),  # small enough for the peer with S × S matrices
        stream_case("llama-3-8b", "down", "linear", 8192, 14336, 4096),
        stream_case("llama-3-8b", "rms_norm", "rms_norm", 8192, 4096, 4096),
        stream_case("llama-3-8b", "swiglu", "gated_activation", 8192, 14336, 14336),
        stream_case("bert-large", "layer_norm", "layer_norm", 8192, 1024, 1024),
        stream_case("bert-large", "gelu", "activation", 8192, 4096, 4096),
    ]


def _gpu_routing() -> list[Case]:
    """A mixed batch of 8 tasks first, then more tasks than that, and few rows."""
    layer = ("llama-3-8b", "q")
    return [
        *(routing_case(*layer, 16, 512, 8, phase=phase) for phase in _PHASES),
        routing_case(*layer, 16, 512, 8, "skewed"),
        routing_case(*layer, 64, 128, 64, "distinct"),
        routing_case(*layer, 8192, 1, 8),
        routing_case(*layer, 64, 1, 64, "distinct", "forward"),
        routing_case("flan-t5-xl", "wi", 64, 64, 8, heads=8),
    ]


def _routing() -> list[Case]:
    """Mixed batches of 1 to 64 tasks: long examples and short ones, evenly spread, skewed and all distinct."""
    layer = ("flan-t5-base", "q")
    return [
        *(routing_case(*layer, batch, 2048 // batch, 8) for batch in (16, 64, 2048)),
        *(routing_case(*layer, 64, 32, tasks) for tasks in (1, 64)),
        *(routing_case(*layer, 64, 32, tasks, "skewed") for tasks in (8, 64)),
        routing_case(*layer, 16, 128, 16, "distinct"),
        routing_case(*layer, 128, 16, 128, "distinct"),
        routing_case(*layer, 64, 32, 8, heads=8),
        routing_case(*layer, 64, 32, 8, phase="forward"),
        routing_case(*layer, 8, 1, 8, "distinct", "forward"),
    ]


def _compiled() -> list[Case]:
    """Few cases, because torch.compile takes a while for every provider: run it with --compiled."""
    return [
        layer_case("llama-3-8b", "q", 8192, "short", "forward"),
        layer_case("llama-3-8b", "q", 8192, "short"),
        layer_case("llama-3-8b", "q", 8192, "pair"),
        layer_case("flan-t5-xl", "wi", 4096, "short"),
    ]


def _full() -> list[Case]:
    """Every layer at every M, rank, form and phase: hours; narrow it with --case."""
    return [
        layer_case(model, name, M, form, phase, rank)
        for model, layers in LAYERS.items()
        for name in layers
        for M in (1, 16, 128, 512, 2048, 8192, 16384)
        for rank in (4, 16, 64, 128)
        for form in ("short", "pair")
        for phase in ("forward", "forward_backward")
    ]


SUITES = {
    "quick": _quick,
    "default": _default,
    "gpu": _gpu,
    "routing": _routing,
    "compiled": _compiled,
    "small_m": _small_m,
    "full": _full,
}
