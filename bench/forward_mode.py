"""A training step of MeanFlow on a diffusion transformer: `linlora.functional.dual` against the ways of PyTorch.

    plain                         forward and backward of the network alone, the floor
    dual                          output and tangent in one pass, backward of the output
    torch.func.jvp                the same, with attention composed of its pieces, which is what it differentiates
    no_grad jvp, second forward   the tangent without a graph, then the network once more for backward

Each is checked against torch.func.jvp in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from linlora.functional import dual

from .job import switched
from .measure import Clock, WallClock, interleaved, quantiles, ratio
from .memory import kept_bytes, peak_bytes, resident_bytes

_TOLERANCE = 1e-4  # of the gradients of a step in float32


@dataclass(frozen=True)
class Size:
    """A diffusion transformer of latents (batch, 4, side, side) in patches of 2 × 2."""

    width: int
    heads: int
    depth: int
    batch: int
    side: int


SIZES = {
    "tiny": Size(32, 2, 2, 2, 8),
    "dit-s": Size(384, 6, 12, 2, 32),
    "dit-b": Size(768, 12, 12, 4, 32),
}


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2)])
        self.qkv, self.out, self.condition = (nn.Linear(width, n * width) for n in (3, 1, 6))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(functional.silu(condition))[:, None].chunk(6, -1)
        qkv = self.qkv(self.norms[0](x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1))
        o = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + gate * self.out(o.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class _DiT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.embed, self.norm, self.leave = nn.Conv2d(4, width, 2, 2), nn.LayerNorm(width), nn.Linear(width, 16)
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([_Block(width, size.heads) for _ in range(size.depth)])

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        condition, x = self.times(torch.stack([t, t - r], -1)), self.embed(z).flatten(2).mT
        for block in self.blocks:
            x = block(x, condition)
        side = z.shape[-1] // 2
        x = self.leave(self.norm(x)).view(-1, side, side, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(z.shape)


Derivative = Callable[..., tuple[Tensor, Tensor | None]]


def _plain(net: nn.Module, inputs: tuple, tangents: tuple) -> tuple[Tensor, None]:
    return net(*inputs), None


def _functorch(net: nn.Module, inputs: tuple, tangents: tuple) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(net, inputs, tangents)


def _two_passes(net: nn.Module, inputs: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        tangent = _functorch(net, inputs, tangents)[1]
    return net(*inputs), tangent


PROVIDERS: dict[str, Derivative] = {
    "plain": _plain,
    "dual": dual,
    "torch.func.jvp": _functorch,
    "no_grad jvp, second forward": _two_passes,
}


class StepJob:
    """Forward, MeanFlow's loss and backward of a network of this size; every provider's has the same weights."""

    def __init__(self, size: Size, device: torch.device, derivative: Derivative, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        net, shape = _DiT(size), (size.batch, 4, size.side, size.side)
        z, v, t = torch.randn(shape), torch.randn(shape), torch.rand(size.batch)
        self.net = net.to(device, dtype)
        z, v, t = (x.to(device, dtype) for x in (z, v, t))
        self.inputs, self.tangents = (z, t * 0.5, t), (v, torch.zeros_like(t), torch.ones_like(t))
        self.derivative = derivative

    def context(self) -> ExitStack:
        return switched(None)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.derivative(self.net, self.inputs, self.tangents)

    def step(self) -> Tensor:
        self.net.zero_grad()
        v, (_, r, t) = self.tangents[0], self.inputs
        u, u_tangent = self.forward()
        target = v if u_tangent is None else (v - (t - r).view(-1, 1, 1, 1) * u_tangent).detach()
        loss = (u - target).square().mean()
        loss.backward()
        return loss

    def results(self) -> dict[str, Tensor]:
        loss = self.step().detach()
        gradients = [p.grad.flatten() for p in self.net.parameters() if p.grad is not None]
        return {"loss": loss, "gradient": torch.cat(gradients)}

    def resident(self) -> Iterable[Tensor]:
        return [*chain(self.net.parameters(), self.net.buffers()), *self.inputs, *self.tangents]


@dataclass(frozen=True)
class Measured:
    """Seconds a step (20 %, median, 80 %), the median ratio to the floor, and bytes.

    Attributes:
        peak: of a step, with the parameters, without an optimizer's state.
        model: the parameters.
        kept: what the forward leaves for the backward.
    """

    name: str
    seconds: tuple[float, float, float]
    ratio: float
    peak: int
    model: int
    kept: int


def measure(
    name: str,
    device: torch.device,
    seconds: float = 20.0,
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
) -> list[Measured]:
    """Every provider on a network of `SIZES`. Raises RuntimeError where one computes something else."""
    size = SIZES[name]
    exact = StepJob(size, device, _functorch, torch.float64).results()
    jobs = {provider: StepJob(size, device, derivative, dtype) for provider, derivative in PROVIDERS.items()}
    for provider, job in jobs.items():
        if provider != "plain":
            _check(provider, job.results(), exact, dtype)
        else:
            job.step()
        job.net.zero_grad()  # as a step does first: gradients are counted where the backward allocates them
    peaks = {provider: peak_bytes(job, device) for provider, job in jobs.items()}
    kept = {provider: kept_bytes(job.forward, device) for provider, job in jobs.items()}
    model = resident_bytes(list(jobs["plain"].net.parameters()))
    turns = interleaved({provider: [job] for provider, job in jobs.items()}, clock or WallClock(device), seconds)
    samples = {provider: [turn.seconds for turn in taken] for provider, taken in turns.items()}
    return [
        Measured(provider, quantiles(taken), ratio(taken, samples["plain"]), peaks[provider], model, kept[provider])
        for provider, taken in samples.items()
    ]


def _check(provider: str, actual: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    tolerance = _TOLERANCE if dtype == torch.float32 else 5e-2
    for key, expected in exact.items():
        error = (actual[key].double() - expected).norm() / expected.norm()
        if not error <= tolerance:
            raise RuntimeError(f"{provider}: {key} has a relative error of {error:.1e}, more than {tolerance:.0e}")


def table(found: list[Measured]) -> str:
    lines = [f"{'':30}{'s a step':>10}{'of plain':>10}{'peak MB':>10}{'over the model':>16}{'kept MB':>10}"]
    lines += [
        f"{m.name:30}{m.seconds[1]:10.3f}{m.ratio:10.2f}{m.peak / 1e6:10.0f}{(m.peak - m.model) / 1e6:16.0f}"
        f"{m.kept / 1e6:10.0f}"
        for m in found
    ]
    return "\n".join(lines)
