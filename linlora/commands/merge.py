"""`linlora merge`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors
from linlora.commands.methods import METHOD_HELP


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base model (safetensors).")],
    adapters: Annotated[
        list[str],
        typer.Argument(help="Task vectors or adapter folders, each with a weight if one is given: A:0.6 B:-0.2."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; it must not exist.")],
    method: Annotated[
        str | None, typer.Option(help=f"{METHOD_HELP} Of ΔW itself ties too. The sum if left out.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method: --set scaling=0.5 (repeatable).")
    ] = None,
) -> None:
    """Merge adapters into the weights of a base model, from file to file: linlora merge BASE ADAPTER --out MERGED

    Several are summed as ΔW, whatever their ranks and layers, each times its weight: linlora merge BASE A:0.6 B:-0.2.
    Or they are fused, --method tsv: then the weights multiply ΔW before. BASE is the base model of all, whatever name
    they record; a note says where that is another.

    W + ΔW is summed in float32 and rounded to the dtype of W once. The model is not built: a shard streams through
    memory, weight by weight. The result is a plain model folder for transformers, vLLM or SGLang.
    """
    from rich.console import Console

    with user_errors(interrupted="interrupted; nothing was written"):
        from linlora.fusion.search import bar
        from linlora.merging import merge_files
        from linlora.training.recipe import assigned

        start = time.perf_counter()
        paths, weights = zip(*map(weighted, adapters), strict=True)
        given = any(weight is not None for weight in weights)
        if set_ and method is None:
            raise ValueError("--set is an option of a method; name it with --method")
        merged = merge_files(
            base, paths, out, progress=lambda shards: bar(shards, "merging"), method=method,
            weights=[1.0 if weight is None else weight for weight in weights] if given else None,
            options=dict(assigned(set_ or [])),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        console = Console(soft_wrap=True, highlight=False, markup=False)
        replaced = f", {merged.replaced} replaced" if merged.replaced else ""
        console.print(
            f"{out}: {merged.folded} of {merged.tensors} tensors folded{replaced}; {merged.nbytes / 1e9:.2f} GB in "
            f"{seconds:.1f} s"
        )
        if merged.left_out:
            console.print(f"not copied, of the base alone: {', '.join(merged.left_out)}")
        for note in merged.notes:
            console.print(f"note: {note}")
        console.print(f"it loads by {_class_of(out)}.from_pretrained({str(out)!r})")


def _class_of(folder: Path) -> str:
    """The class of a model, as its configuration names it."""
    import json

    path = folder / "config.json"
    named = json.loads(path.read_text("utf-8")).get("architectures") if path.is_file() else None
    return named[0] if named else "AutoModel"


def weighted(argument: str) -> tuple[str, float | None]:
    """A path and the weight behind it.

    >>> weighted("adapters/a:-0.2"), weighted("adapters/a")
    (('adapters/a', -0.2), ('adapters/a', None))
    """
    path, colon, text = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, None
    try:
        weight = float(text)
    except ValueError:
        return argument, None
    if not math.isfinite(weight):
        raise ValueError(f"{argument}: the weight has to be finite")
    return path, weight
