"""What the user reads: the table, and a paragraph that says what the numbers say, good or bad."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from linlora.quickstart.results import paired_difference
from linlora.quickstart.settings import FAMILIES, Family

METHOD_TITLES = {"average": "average", "task_arithmetic": "task arithmetic", "scaling_one": "sum (λ = 1)"}
_SHORT = {"lora": "LoRA", "layer": "layer scope", "model": "model scope"}
_PAIRS: tuple[tuple[Family, Family], ...] = (("layer", "lora"), ("model", "lora"), ("model", "layer"))


def table(results: dict[str, Any]) -> Table:
    """Accuracies on the test split in %, mean ± standard deviation over seeds; step times are medians."""
    families = [results["families"][family] for family in FAMILIES]
    times = results["step_time"]["median_ms"]
    seeds, tasks = results["seeds"], len(results["tasks"])
    over_seeds = f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed"
    view = Table(title=f"Test accuracy in %, mean of {tasks} tasks, {over_seeds}", caption=_caption(results))
    view.add_column("", no_wrap=True)
    for family in FAMILIES:
        view.add_column(_SHORT[family], justify="right", no_wrap=True)

    view.add_row("before fine-tuning", *[percent(sum(results["pretrained"]) / tasks)] * len(FAMILIES))
    view.add_row("single task", *(spread(entry["single"]) for entry in families))
    for method, title in METHOD_TITLES.items():
        view.add_row(title, *(spread(entry[method]["absolute"]) for entry in families))
        view.add_row("  normalised", *(spread(entry[method]["normalised"]) for entry in families))
    view.add_row("λ, chosen on validation", *(" ".join(f"{s:g}" for s in entry["scaling"]) for entry in families))
    view.add_row("step time in ms", *(f"{times[family]:.1f}" for family in FAMILIES))
    view.add_row("step time / LoRA", *(f"{times[family] / times['lora']:.2f} x" for family in FAMILIES))
    peers = [times.get(f"{family}_torch_func") for family in FAMILIES]
    view.add_row("torch.func in ms", *("–" if peer is None else f"{peer:.1f}" for peer in peers))
    view.add_row("torch.func / LoRA", *("–" if peer is None else f"{peer / times['lora']:.2f} x" for peer in peers))
    return view


def _caption(results: dict[str, Any]) -> str:
    steps, differences = results["step_time"]["steps"], results["step_time"]["max_loss_difference"]
    agreement = " and ".join(
        f"differ by {difference:.0e} at most at {scope} scope" if difference else f"are equal at {scope} scope"
        for scope, difference in differences.items()
    )
    return (
        "Layer, model scope: linearized LoRA. Normalised: over single task.\n"
        f"torch.func: the same training without linlora; the losses of {steps} steps\n{agreement}."
    )


def reading(results: dict[str, Any]) -> str:
    """Sentences computed from the numbers. A difference smaller than its own deviation is not called one."""
    families, times = results["families"], results["step_time"]["median_ms"]
    before = sum(results["pretrained"]) / len(results["tasks"])
    sentences = [f"Single task: {comparisons(results, 'single')}."]
    for method, title in METHOD_TITLES.items():
        sentences.append(f"Fused by {title}, normalised: {comparisons(results, method, 'normalised')}.")
    kept = (
        f"{_SHORT[family]} {percent(families[family]['task_arithmetic']['normalised']['mean'])} → "
        f"{percent(families[family]['scaling_one']['normalised']['mean'])} %"
        for family in FAMILIES
    )
    gained = ", ".join(
        f"{points(families[family]['task_arithmetic']['absolute']['mean'] - before)} ({_SHORT[family]})"
        for family in FAMILIES
    )
    steps = (
        f"{times[scope] / times['lora']:.2f} x at {scope} scope (torch.func: "
        f"{times[f'{scope}_torch_func'] / times['lora']:.2f} x)"
        for scope in ("layer", "model")
    )
    return "\n".join([
        *sentences,
        f"From the best λ to λ = 1 the normalised score goes: {', '.join(kept)}.",
        f"The backbone before fine-tuning has {percent(before)} %; task arithmetic changes that by {gained}.",
        f"Against a LoRA step, a linearized one takes {' and '.join(steps)}.",
        "The adapters start at B0 = 0, where the linearized ones train B alone (A frozen): half the parameters.",
    ])  # fmt: skip


def comparisons(results: dict[str, Any], key: str, part: str | None = None) -> str:
    """Every family against every other, by one number of theirs."""
    return "; ".join(
        compare(_SHORT[one], _SHORT[other], paired_difference(results, (one, other), key, part))
        for one, other in _PAIRS
    )


def compare(one: str, other: str, difference: dict[str, Any]) -> str:
    """'model scope is better than LoRA by 1.2 ± 0.3 points' for a paired difference of fractions."""
    mean, std = difference["mean"], difference["std"]
    verdict = f"{one} is {'better' if mean > 0 else 'worse'} than {other} by {100 * abs(mean):.1f}"
    if std is None:
        return f"{verdict} points (one seed)" if mean else f"{one} and {other} are equal (one seed)"
    if abs(mean) <= std:
        return f"{one} and {other} do not clearly differ ({100 * mean:+.1f} ± {100 * std:.1f} points)"
    return f"{verdict} ± {100 * std:.1f} points"


def spread(value: dict[str, Any]) -> str:
    return percent(value["mean"]) + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    return f"{100 * fraction:+.1f} points"
