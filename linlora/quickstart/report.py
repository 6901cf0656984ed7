"""What the user reads: the table, and a paragraph that says what the numbers say, good or bad."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from linlora.quickstart.results import paired_difference


def table(results: dict[str, Any]) -> Table:
    """Accuracies on the test split in %, mean ± standard deviation over seeds; step times are medians."""
    families, times = results["families"], results["step_time"]["median_ms"]
    seeds, tasks = results["seeds"], len(results["tasks"])
    over_seeds = f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed"
    steps, difference = results["step_time"]["steps"], results["step_time"]["max_loss_difference"]
    agreement = f"differ by {difference:.0e} at most" if difference else "are equal bit for bit"
    view = Table(
        title=f"Test accuracy in %, mean of {tasks} tasks, {over_seeds}",
        caption="torch.func: the same training as linearized LoRA, without linlora.\n"
        f"The losses of {steps} steps {agreement}.",
    )
    view.add_column("", no_wrap=True)
    for column in ("LoRA", "linearized LoRA", "torch.func"):
        view.add_column(column, justify="right", no_wrap=True)
    lora, linearized = families["lora"], families["linearized"]

    before = percent(sum(results["pretrained"]) / tasks)
    view.add_row("before fine-tuning", before, before, "=")
    view.add_row("single task", spread(lora["single"]), spread(linearized["single"]), "=")
    for key, title in (("average", "average"), ("task_arithmetic", "task arithmetic"), ("scaling_one", "sum (λ = 1)")):
        view.add_row(f"{title}, absolute", *(spread(family[key]["absolute"]) for family in (lora, linearized)), "=")
        view.add_row(f"{title}, normalised", *(spread(family[key]["normalised"]) for family in (lora, linearized)), "=")
    view.add_row(
        "λ, chosen on validation", *(", ".join(f"{s:g}" for s in f["scaling"]) for f in (lora, linearized)), "="
    )
    view.add_row("step time in ms", *(f"{times[name]:.1f}" for name in ("lora", "linearized", "torch_func")))
    ratios = (f"{times[name] / times['lora']:.2f} x" for name in ("lora", "linearized", "torch_func"))
    view.add_row("step time / LoRA", *ratios)
    return view


def reading(results: dict[str, Any]) -> str:
    """One paragraph computed from the numbers. A difference smaller than its own deviation is not called one."""
    families, times = results["families"], results["step_time"]["median_ms"]
    before = sum(results["pretrained"]) / len(results["tasks"])
    best_fused = {name: family["task_arithmetic"]["absolute"]["mean"] for name, family in families.items()}
    summed = {name: family["scaling_one"]["absolute"]["mean"] for name, family in families.items()}
    sentences = [
        f"Single task: {compare(paired_difference(results, 'single'))}.",
        f"Fused by average: {compare(paired_difference(results, 'average', 'absolute'))}; "
        f"normalised, {compare(paired_difference(results, 'average', 'normalised'))}.",
        f"Fused by task arithmetic: {compare(paired_difference(results, 'task_arithmetic', 'absolute'))}; "
        f"normalised, {compare(paired_difference(results, 'task_arithmetic', 'normalised'))}.",
        f"All vectors summed as they are (λ = 1): LoRA {percent(summed['lora'])} %, "
        f"linearized {percent(summed['linearized'])} %; "
        f"{compare(paired_difference(results, 'scaling_one', 'absolute'))}.",
        f"The backbone before fine-tuning has {percent(before)} %; task arithmetic changes that by "
        f"{points(best_fused['lora'] - before)} (LoRA) and {points(best_fused['linearized'] - before)} (linearized).",
        f"A linearized step takes {times['linearized'] / times['lora']:.2f} x a LoRA step with linlora and "
        f"{times['torch_func'] / times['lora']:.2f} x with torch.func.",
        "The adapters start at B0 = 0, where the linearized layer trains B alone (A frozen): half the parameters.",
    ]
    return " ".join(sentences)


def compare(difference: dict[str, Any]) -> str:
    """'linearized is better by 1.2 ± 0.3 points' for a paired difference of fractions."""
    mean, std = difference["mean"], difference["std"]
    size = f"{100 * abs(mean):.1f}" + ("" if std is None else f" ± {100 * std:.1f}") + " points"
    if std is None:
        return f"linearized is {'better' if mean > 0 else 'worse'} by {size} (one seed)" if mean else "no difference"
    if abs(mean) <= std:
        return f"no clear difference (linearized {points(mean)}, ± {100 * std:.1f} over seeds)"
    return f"linearized is {'better' if mean > 0 else 'worse'} by {size}"


def spread(value: dict[str, Any]) -> str:
    return percent(value["mean"]) + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    return f"{100 * fraction:+.1f} points"
