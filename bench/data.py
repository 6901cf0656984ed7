"""The random tensors of a case, from which every provider is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from linlora.kernels.packing import pack, present
from linlora.kernels.problem import LoraLinear
from torch import Tensor

from .cases import Case

SCALING = 2.0  # alpha = 2 r, the usual choice


@dataclass(frozen=True)
class LayerData:
    """One layer with its input, and its cotangents, on the device and in the dtype of the case.

    (A0, B0) is the linearization point and (A, B) = (A0 + dA, B0 + dB) the adapter now; plain LoRA is measured at
    (A, B). In the short form A = A0. A second stream and the second cotangent belong to `lora_linear`.
    """

    problem: LoraLinear
    A: Tensor
    B: Tensor
    cotangents: tuple[Tensor, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        x, x_tangent = self.problem.x, self.problem.x_tangent
        return (x,) if x_tangent is None else (x, x_tangent)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The inputs that ask for a gradient, by the names of `linlora.bench.gate`."""
        return dict(zip(("grad_x", "grad_x_tangent"), self.inputs, strict=False))

    @property
    def tensors(self) -> list[Tensor]:
        return [*present(pack(self.problem)[0]), self.A, self.B, *self.cotangents]


@dataclass(frozen=True)
class StreamData:
    """The inputs of an op of model scope with their tangents, its frozen parameters and the cotangent of its primal."""

    case: Case
    primals: dict[str, Tensor]
    tangents: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    cotangents: tuple[Tensor]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (*self.primals.values(), *self.tangents)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The inputs that ask for a gradient, by the names of `linlora.bench.gate`."""
        return {f"grad_{name}": primal for name, primal in self.primals.items()}

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.parameters.values(), *self.cotangents]


@dataclass(frozen=True)
class RoutedData:
    """A layer with an inventory A (Q, S, K/Q, r), B (Q, S, r, N/Q), logits Z (T, Q·S), and a mixed batch x of it."""

    case: Case
    x: Tensor
    task_ids: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    Z: Tensor
    cotangents: tuple[Tensor]

    @property
    def inputs(self) -> tuple[Tensor]:
        return (self.x,)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The input that asks for a gradient, by its name in `linlora.bench.gate`."""
        return {"grad_x": self.x}

    @property
    def tensors(self) -> list[Tensor]:
        return [*(tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)), *self.cotangents]


Data = LayerData | StreamData | RoutedData


def random_data(case: Case, device: torch.device, seed: int = 0) -> Data | None:
    """The tensors of a case; a whole model has none to share."""
    if case.kind == "model":
        return None
    if case.kind == "routing":
        return random_routed(case, device, seed)
    return random_layer(case, device, seed) if case.kind == "layer" else random_streams(case, device, seed)


def random_layer(case: Case, device: torch.device, seed: int = 0) -> LayerData:
    """Normal noise of the magnitudes of a trained layer; the low-rank terms are as large as the base, so that an
    error in one of them shows in the output."""
    normal = _normal(case, device, seed)
    M, K, N, r = case.M, case.K, case.N, case.rank
    dual = case.op == "lora_linear"
    x, x_tangent = normal(M, K), normal(M, K) if dual else None
    weight, bias = normal(N, K, scale=K**-0.5), normal(N) if case.bias else None
    A0, dB = normal(r, K, scale=K**-0.5), normal(N, r, scale=r**-0.5)
    B0 = dA = None
    A, B = A0, dB
    if case.form == "pair":
        B0 = normal(N, r, scale=r**-0.5)
        # Tangents as the differences that torch.func takes, rounding and all: every provider linearizes the same step.
        A, B = A0 + normal(r, K, scale=K**-0.5), B0 + dB
        dA, dB = A - A0, B - B0
    cotangents = tuple(normal(M, N) for _ in range(2 if dual else 1))
    for tensor in (x, x_tangent) if case.phase != "forward" else ():
        if tensor is not None:
            tensor.requires_grad_()
    mask = torch.tensor(seed, device=device) if case.dropout else None
    problem = LoraLinear(x, weight, bias, A0, B0, dA, dB, SCALING, x_tangent, case.dropout, mask, two_streams=dual)
    return LayerData(problem, A, B, cotangents)


def random_routed(case: Case, device: torch.device, seed: int = 0) -> RoutedData:
    """Normal noise of the magnitudes of a trained layer; the update, of scale 1 / r, is as large as the base."""
    normal = _normal(case, device, seed)
    K, N, r, Q, S, examples = case.K, case.N, case.rank, case.heads, case.skills, case.batch
    return RoutedData(
        case,
        normal(examples, case.M // examples, K).requires_grad_(case.phase != "forward"),
        tasks_of_batch(case).to(device),
        normal(N, K, scale=K**-0.5),
        normal(N) if case.bias else None,
        normal(Q, S, K // Q, r, scale=(S / K) ** 0.5),
        normal(Q, S, r, N // Q, scale=(S * r) ** 0.5),
        normal(case.tasks, Q * S),
        (normal(examples, case.M // examples, N),),
    )


def tasks_of_batch(case: Case) -> Tensor:
    """The task of every example, in an order that mixes them; the same for every copy of the tensors."""
    example = torch.arange(case.batch)
    tasks = example % case.tasks
    if case.tasks_in == "skewed":
        tasks = (-torch.log2((example + 0.5) / case.batch)).long().clamp(max=case.tasks - 1)
    return tasks[torch.randperm(case.batch, generator=torch.Generator().manual_seed(0))]


def random_streams(case: Case, device: torch.device, seed: int = 0) -> StreamData:
    """Normal noise; tangents as large as their primals, so that an error in one shows."""
    normal = _normal(case, device, seed)
    inputs, parameters, output = stream_shapes(case)
    return StreamData(
        case,
        {name: normal(*shape).requires_grad_(case.phase != "forward") for name, shape in inputs.items()},
        tuple(normal(*shape) for shape in inputs.values()),
        {
            name: normal(*shape, scale=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
            for name, shape in parameters.items()
        },
        (normal(*output),),
    )


def stream_shapes(case: Case) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], tuple[int, ...]]:
    """The shapes of the inputs and of the parameters of an op of model scope, by name, and of its output."""
    M, K, N = case.M, case.K, case.N
    if case.op == "attention":
        heads = (case.batch, case.heads, M, K)
        return dict.fromkeys("qkv", heads), {}, heads
    if case.op == "linear":
        return {"x": (M, K)}, {"weight": (N, K), "bias": (N,)}, (M, N)
    inputs = ("gate", "up") if case.op == "gated_activation" else ("x",)
    parameters = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",)}.get(case.op, ())
    return dict.fromkeys(inputs, (M, N)), dict.fromkeys(parameters, (N,)), (M, N)


def _normal(case: Case, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """Draws normal noise of a shape, times `scale`, in the dtype of the case."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal
