"""MeanFlow (Geng et al., 2025) on handwritten digits: one-step samples from a small diffusion transformer, on a CPU.

    python examples/meanflow/meanflow.py --out runs/meanflow

Trains with `linlora.functional.dual`, compares its losses, time and memory with `torch.func.jvp`, and draws samples.
"""

import argparse
import json
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from linlora.functional import dual


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(2)])
        self.condition, self.qkv, self.out = (
            nn.Linear(width, 6 * width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.condition.weight), nn.init.zeros_(self.condition.bias)

    def forward(self, x, condition):
        shift, scale, gate, shift2, scale2, gate2 = self.condition(F.silu(condition))[:, None].chunk(6, -1)
        q, k, v = (
            self.qkv(self.norms[0](x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """u(z, r, t | digit): the mean velocity between the times r and t, of images (B, 1, 8, 8) in patches of 2 × 2."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.classes = nn.Conv2d(1, width, 2, 2), nn.Embedding(10, width)
        self.times = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, z, r, t, digit):
        frequencies = torch.exp(torch.linspace(0.0, 4.0, 16))
        angles = torch.cat([time[:, None] * frequencies for time in (t, t - r)], dim=1)
        condition = self.times(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.classes(digit)
        x = self.embed(z).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(self.norm(x)).view(-1, 4, 4, 2, 2)
        return x.permute(0, 1, 3, 2, 4).reshape(z.shape)


def func_jvp(function, inputs, tangents):
    """The same by torch.func: attention must be composed, and the tangent's graph is kept."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(function, inputs, tangents)


def meanflow_loss(net, derivative, x, digit, generator):
    """The squared error of u against v − (t − r) du/dt, weighted by its own size (p = 1)."""
    e = torch.randn(x.shape, generator=generator)
    times = torch.sigmoid(torch.randn(2, len(x), generator=generator) - 0.4)
    t, r = times.amax(0), times.amin(0)
    r = torch.where(torch.rand(len(x), generator=generator) < 0.5, t, r)  # half of them plain flow matching
    z = x + t.view(-1, 1, 1, 1) * (e - x)
    v = e - x
    u, du_dt = derivative(lambda z, r, t: net(z, r, t, digit), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    error = (u - (v - (t - r).view(-1, 1, 1, 1) * du_dt).detach()).square().sum((1, 2, 3))
    return (error / (error.detach() + 1e-2)).mean(), error.mean().item()


class Run:
    """A network, its optimizer and its own random numbers: two runs of one seed see the same batches."""

    def __init__(self, derivative, steps: int) -> None:
        torch.manual_seed(0)
        self.net, self.derivative, self.generator = DiT(), derivative, torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 2e-3, total_steps=steps + 1, pct_start=0.05)
        data = load_digits()
        self.images = torch.tensor(data.images / 8.0 - 1.0, dtype=torch.float32)[:, None]
        self.digits = torch.tensor(data.target)

    def step(self, batch: int = 64) -> float:
        rows = torch.randint(len(self.images), (batch,), generator=self.generator)
        loss, error = meanflow_loss(self.net, self.derivative, self.images[rows], self.digits[rows], self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return error


@torch.no_grad()
def samples(net, rows: int = 6):
    """One evaluation from noise to image, a column a digit: x = e − u(e, 0, 1)."""
    digit = torch.arange(10).repeat(rows)
    e = torch.randn(len(digit), 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return e - net(e, torch.zeros(len(digit)), torch.ones(len(digit)), digit)


def picture(images, columns: int = 10, scale: int = 5) -> Image.Image:
    grid = ((images.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).numpy()[:, 0]
    tiles = np.pad(np.kron(grid, np.ones((1, scale, scale), np.uint8)), ((0, 0), (2, 2), (2, 2)), constant_values=60)
    return Image.fromarray(np.vstack([np.hstack(list(tiles[n : n + columns])) for n in range(0, len(tiles), columns)]))


def peak_megabytes(run: Run) -> float:
    """The highest sum of live allocations during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run.step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 1e6


def compare(steps: int) -> dict:
    """Both derivatives in turns on the same batches: losses, CPU seconds a step (median), peak memory."""
    runs = {"dual": Run(dual, steps), "torch.func.jvp": Run(func_jvp, steps)}
    losses: dict = {name: [] for name in runs}
    seconds: dict = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            started = time.process_time()
            losses[name].append(run.step())
            seconds[name].append(time.process_time() - started)
    difference = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    return {
        "steps": steps,
        "largest relative difference of losses": difference,
        "seconds a step": {name: float(np.median(values)) for name, values in seconds.items()},
        "peak megabytes": {name: peak_megabytes(run) for name, run in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=30, help="steps taken with both derivatives")
    parser.add_argument("--out", type=Path, default=Path("runs/meanflow"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = compare(options.compared)
    print(json.dumps(results, indent=2))
    run, started = Run(dual, options.steps), time.perf_counter()
    errors = []
    for n in range(options.steps):
        errors.append(run.step())
        if (n + 1) % 250 == 0 or n + 1 == options.steps:
            print(
                f"step {n + 1}: error {np.mean(errors[-250:]):.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    results["training"] = {"steps": options.steps, "minutes": (time.perf_counter() - started) / 60}
    picture(samples(run.net)).save(options.out / "samples.png")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
