"""What is measured: the layer shapes of real models, at the batch sizes, ranks and phases of their use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Op = Literal["linearized_lora_linear", "lora_linear", "model"]
Form = Literal["short", "pair"]
Phase = Literal["forward", "forward_backward", "training_step"]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a layer (M, K) → (M, N) of a model, or a training step of a whole model.

    `form` is "short" when the adapter is linearized at B0 = 0 (where PEFT starts) and "pair" when B0 ≠ 0.
    In phase "forward_backward" the input asks for a gradient: the layer stands in the middle of a network.
    Op "lora_linear" carries a tangent of the input beside the primal (two streams). Op "model" is a training step of
    `linlora.bench.models.MODELS[model]`, with M its tokens in a batch and K = N its hidden size.
    """

    name: str
    model: str
    M: int
    K: int
    N: int
    rank: int = 16
    dtype: str = "float32"
    form: Form = "short"
    phase: Phase = "forward_backward"
    op: Op = "linearized_lora_linear"
    bias: bool = False

    @property
    def layer(self) -> str:
        """Model, layer and shape M×K×N; of a whole model, the tokens in a batch."""
        if self.op == "model":
            return f"{self.model} {self.M} tokens"
        return f"{self.model} {self.name} {self.M}x{self.K}x{self.N}"

    @property
    def title(self) -> str:
        """`layer` for people to read."""
        return re.sub(r"(?<=\d)x(?=\d)", "×", self.layer) if self.op != "model" else self.layer

    @property
    def variant(self) -> str:
        """The form, or "dual" for the op with two streams."""
        return "dual" if self.op == "lora_linear" else self.form

    @property
    def id(self) -> str:
        """The whole case in one string, which `linlora bench --case` filters by."""
        return f"{self.layer} r{self.rank} {self.variant} {self.phase} {self.dtype}"


@dataclass(frozen=True)
class LayerShape:
    """A linear layer of a model."""

    K: int
    N: int
    bias: bool = False


LAYERS: dict[str, dict[str, LayerShape]] = {
    "clip-vit-b16": {
        "q": LayerShape(768, 768, True),
        "fc1": LayerShape(768, 3072, True),
        "fc2": LayerShape(3072, 768, True),
    },
    "flan-t5-base": {"q": LayerShape(768, 768), "wi": LayerShape(768, 2048), "wo": LayerShape(2048, 768)},
    "flan-t5-large": {"q": LayerShape(1024, 1024)},
    "flan-t5-xl": {"q": LayerShape(2048, 2048), "wi": LayerShape(2048, 5120), "wo": LayerShape(5120, 2048)},
    "llama-3-8b": {
        "q": LayerShape(4096, 4096),
        "k": LayerShape(4096, 1024),
        "up": LayerShape(4096, 14336),
        "down": LayerShape(14336, 4096),
    },
    "qwen-2.5-7b": {
        "q": LayerShape(3584, 3584, True),
        "k": LayerShape(3584, 512, True),
        "up": LayerShape(3584, 18944),
        "down": LayerShape(18944, 3584),
    },
    "tiny": {"linear": LayerShape(8, 8)},  # nothing but the cost of a call
}


def layer_case(
    model: str,
    name: str,
    M: int,
    form: Form = "short",
    phase: Phase = "forward_backward",
    rank: int = 16,
    op: Op = "linearized_lora_linear",
) -> Case:
    """The case of a layer of `LAYERS` with M rows of input."""
    shape = LAYERS[model][name]
    return Case(name, model, M, shape.K, shape.N, rank=rank, form=form, phase=phase, op=op, bias=shape.bias)


def dual_case(model: str, name: str, M: int, phase: Phase = "forward_backward") -> Case:
    """The case of `lora_linear` with both streams, at B0 ≠ 0."""
    return layer_case(model, name, M, "pair", phase, op="lora_linear")


def model_case(model: str, form: Form = "short", rank: int = 16) -> Case:
    """A training step of a model of `linlora.bench.models.MODELS`."""
    from .models import MODELS  # transformers takes seconds to import: not for listing cases

    spec = MODELS[model]
    tokens = spec.batch * spec.tokens
    return Case("step", model, tokens, spec.hidden, spec.hidden, rank, form=form, phase="training_step", op="model")


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
        chosen = [replace(case, rank=rank) for case in chosen for rank in ranks]
    unique = dict.fromkeys(chosen)
    return [case for case in unique if all(text in case.id for text in filters)]


def _quick() -> list[Case]:
    return [
        layer_case("tiny", "linear", 4, "short", "forward"),
        layer_case("tiny", "linear", 4, "pair"),
        layer_case("flan-t5-base", "q", 128, "short"),
        layer_case("flan-t5-base", "q", 128, "pair"),
        dual_case("flan-t5-base", "q", 128),
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
        model_case("bert-4x256"),
        model_case("vit-4x256"),
        *(layer_case(*main, "short", rank=rank) for rank in (4, 64, 128)),
        layer_case("clip-vit-b16", "fc1", 788, "short"),
        layer_case("flan-t5-base", "wi", 512, "pair"),
        layer_case("flan-t5-xl", "q", 256, "short"),
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
    both: tuple[Phase, ...] = ("forward", "forward_backward")
    main = ("llama-3-8b", "q", 8192)
    large = [
        *(layer_case(*main, form, phase) for form in ("short", "pair") for phase in both),
        *(dual_case(*main, phase) for phase in both),
        *(layer_case("llama-3-8b", name, 8192, "pair") for name in ("k", "up", "down")),
        *(layer_case("qwen-2.5-7b", name, 8192, "short") for name in ("q", "up")),
        layer_case("qwen-2.5-7b", "down", 4096, "pair"),
        layer_case("llama-3-8b", "q", 16384, "pair"),
        *(layer_case("flan-t5-xl", name, 4096, "short") for name in ("q", "wi", "wo")),
        dual_case("flan-t5-xl", "q", 4096),
    ]
    ranks = [layer_case(*main, "pair", phase, rank) for rank in (4, 64, 128) for phase in both]
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
    return [*large, *ranks, *middle, *small, model_case("bert-12x768"), model_case("vit-12x768")]


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
    "compiled": _compiled,
    "small_m": _small_m,
    "full": _full,
}
