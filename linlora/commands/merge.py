"""`linlora merge`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base model (safetensors).")],
    adapters: Annotated[list[Path], typer.Argument(help="Task vectors or adapter folders; their changes are summed.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; it must not exist.")],
) -> None:
    """Merge adapters into the weights of a base model, from file to file: linlora merge BASE ADAPTER --out MERGED

    W + ΔW is summed in float32 and rounded to the dtype of W once. The model is not built: a shard streams through
    memory, weight by weight. The result is a plain model folder for transformers, vLLM or SGLang.
    """
    from rich.console import Console

    with user_errors(interrupted="interrupted; nothing was written"):
        from linlora.fusion.search import bar
        from linlora.merging import merge_files

        start = time.perf_counter()
        merged = merge_files(base, adapters, out, progress=lambda shards: bar(shards, "merging"))
        seconds = time.perf_counter() - start
        console = Console(soft_wrap=True, highlight=False, markup=False)
        replaced = f", {merged.replaced} replaced" if merged.replaced else ""
        console.print(
            f"{out}: {merged.folded} of {merged.tensors} tensors folded{replaced}; {merged.nbytes / 1e9:.2f} GB in "
            f"{seconds:.1f} s"
        )
        if merged.left_out:
            console.print(f"not copied, of the base alone: {', '.join(merged.left_out)}")
        console.print(f"next: AutoModel....from_pretrained({str(out)!r})")
