"""A case: what is measured, at the shapes of real models. `suites` lists the cases of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .shapes import LAYERS, MODELS

LayerOp = Literal["linearized_lora_linear", "lora_linear"]
StreamOp = Literal["linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation"]
RoutingOp = Literal["routed_lora_linear"]
Op = LayerOp | StreamOp | RoutingOp | Literal["model"]
Kind = Literal["layer", "stream", "routing", "model"]
Form = Literal["short", "pair"]
Scope = Literal["layer", "model"]
Batch = Literal["uniform", "skewed", "distinct"]
Phase = Literal["forward", "input_gradient", "forward_backward", "training_step"]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark. Its `kind` follows from the op:

    layer   a LoRA layer (M, K) → (M, N) of a model. `form` is "short" when the adapter is linearized at B0 = 0 (where
            PEFT starts) and "pair" when B0 ≠ 0. Op "lora_linear" carries a tangent of the input beside the primal.
    stream  an op of model scope by itself, both streams: a frozen linear layer (M, K) → (M, N), an elementwise op or a
            norm of (M, N), or attention of (batch, heads, M, K), M being the length and K = N the size of a head.
    routing a LoRA layer on a mixed batch: M rows of `batch` examples, each of one of `tasks` tasks, whose factors are
            mixed from `skills` skills in `heads` heads. `tasks_in` a batch: "uniform", "skewed" (half of the examples
            are of the first task, a quarter of the second, ...) or "distinct" (every example is its own task).
    model   a training step of `linlora.bench.shapes.MODELS[model]`, with M its tokens in a batch and K = N its hidden
            size. At `scope` "layer" the peers linearize every layer by itself, at "model" the network as a whole.

    In phase "forward_backward" the input asks for a gradient: the layer or op stands in the middle of a network. The
    gradient of an op of model scope is that of its primal. Phase "input_gradient" is that gradient alone, of a forward
    that ran before, with nothing trained.

    With `dropout`, a probability, the low-rank branch of a layer sees a mask; only linlora's own backends compute the
    same one, so they are measured against each other and the floor.
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
    batch: int = 1
    heads: int = 1
    causal: bool = False
    scope: Scope = "layer"
    dropout: float = 0.0
    tasks: int = 1
    skills: int = 1
    tasks_in: Batch = "uniform"

    @property
    def kind(self) -> Kind:
        """Which of the four."""
        if self.op == "model":
            return "model"
        if self.op == "routed_lora_linear":
            return "routing"
        return "layer" if self.op in ("linearized_lora_linear", "lora_linear") else "stream"

    @property
    def layer(self) -> str:
        """Model, layer and shape; of a whole model, the tokens in a batch."""
        if self.kind == "model":
            return f"{self.model} {self.M} tokens"
        if self.op == "attention":
            causal = " causal" if self.causal else ""
            return f"{self.model} attention {self.batch}x{self.heads}x{self.M}x{self.K}{causal}"
        if self.kind == "routing":
            tasks = "1 task" if self.tasks == 1 else f"{self.tasks} tasks"
            batch = f"{self.batch}x{self.M // self.batch}x{self.K}x{self.N}"
            spread = f" {self.tasks_in}" if self.tasks > 1 else ""
            heads = f" {self.heads} heads" if self.heads > 1 else ""
            return f"{self.model} {self.name} {batch} {tasks}{spread}{heads}"
        shape = f"{self.M}x{self.N}" if self.kind == "stream" and self.op != "linear" else f"{self.M}x{self.K}x{self.N}"
        return f"{self.model} {self.name} {shape}"

    @property
    def title(self) -> str:
        """`layer` for people to read."""
        return re.sub(r"(?<=\d)x(?=\d)", "×", self.layer) if self.kind != "model" else self.layer

    @property
    def variant(self) -> str:
        """The form, "dual" for an op with two streams, "routed" for a mixed batch."""
        if self.kind == "routing":
            return "routed"
        return "dual" if self.op == "lora_linear" or self.kind == "stream" else self.form

    @property
    def group(self) -> str:
        """The cases that are comparable with each other share a table and an axis of this title."""
        phase = self.phase.replace("forward_backward", "forward + backward").replace("_", " ")
        phase += ", dropout" if self.dropout else ""
        if self.kind == "routing":
            return f"mixed batches of tasks, {phase}"
        if self.kind == "stream":
            return f"{'attention with tangents' if self.op == 'attention' else 'ops of model scope'}, {phase}"
        return f"{phase}, model scope" if self.scope == "model" else phase

    @property
    def id(self) -> str:
        """The whole case in one string, which `linlora bench --case` filters by."""
        rank = f" r{self.rank}" if self.kind != "stream" else ""
        scope = " model-scope" if self.scope == "model" else ""
        dropout = " dropout" if self.dropout else ""
        return f"{self.layer}{rank} {self.variant} {self.phase}{scope}{dropout} {self.dtype}"


def layer_case(
    model: str,
    name: str,
    M: int,
    form: Form = "short",
    phase: Phase = "forward_backward",
    rank: int = 16,
    op: LayerOp = "linearized_lora_linear",
) -> Case:
    """The case of a layer of `LAYERS` with M rows of input."""
    shape = LAYERS[model][name]
    return Case(name, model, M, shape.K, shape.N, rank=rank, form=form, phase=phase, op=op, bias=shape.bias)


def dual_case(model: str, name: str, M: int, phase: Phase = "forward_backward") -> Case:
    """The case of `lora_linear` with both streams, at B0 ≠ 0."""
    return layer_case(model, name, M, "pair", phase, op="lora_linear")


def stream_case(model: str, name: str, op: StreamOp, M: int, K: int, N: int, phase: Phase = "forward_backward") -> Case:
    """An op of model scope on (M, K), with both streams."""
    return Case(name, model, M, K, N, rank=0, form="pair", phase=phase, op=op)


def attention_case(
    model: str, batch: int, heads: int, length: int, size: int, causal: bool, phase: Phase = "forward_backward"
) -> Case:
    """Attention of `heads` heads of `size` over `length` tokens, with both streams."""
    return Case(
        "attention", model, length, size, size, rank=0, form="pair", phase=phase, op="attention",
        batch=batch, heads=heads, causal=causal,
    )  # fmt: skip


def routing_case(
    model: str,
    name: str,
    batch: int,
    length: int,
    tasks: int,
    tasks_in: Batch = "uniform",
    phase: Phase = "forward_backward",
    heads: int = 1,
) -> Case:
    """A layer of `LAYERS` on a mixed batch of examples of `length` rows, with an inventory of 8 skills."""
    shape = LAYERS[model][name]
    return Case(
        name, model, batch * length, shape.K, shape.N, phase=phase, op="routed_lora_linear", bias=shape.bias,
        batch=batch, heads=heads, tasks=batch if tasks_in == "distinct" else tasks, skills=8, tasks_in=tasks_in,
    )  # fmt: skip


def model_case(model: str, form: Form = "short", rank: int = 16, scope: Scope = "layer") -> Case:
    """A training step of a model of `MODELS`."""
    spec = MODELS[model]
    tokens = spec.batch * spec.tokens
    return Case(
        "step", model, tokens, spec.hidden, spec.hidden, rank, form=form, phase="training_step", op="model",
        scope=scope,
    )  # fmt: skip
