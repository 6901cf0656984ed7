"""`linlora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def export(
    vector: Annotated[Path, typer.Argument(help="A task vector, or the folder of an adapter of any format.")],
    out: Annotated[Path, typer.Option(help="The folder of the PEFT adapter.")],
    base: Annotated[
        str | None, typer.Option(help="Base model (hub id or folder), or the folder of an adapter of it.")
    ] = None,
) -> None:
    """Write a task vector as a PEFT adapter that stock PEFT, vLLM and SGLang load, of exactly the same function.

    With --base the adapter names its base model; a folder is checked for the layers of the vector. The configuration
    of an adapter (task type, trained head) is taken over.
    """
    from rich.console import Console

    with user_errors():
        from linlora import formats
        from linlora.formats.adapter_config import read_config
        from linlora.formats.export import export_stored

        stored = formats.open(vector)
        export_stored(stored, out, base)
        config = read_config(out)
        ranks = sorted({config["r"], *config["rank_pattern"].values()})
        console = Console(soft_wrap=True, highlight=False, markup=False)
        console.print(
            f"{out}: {len(stored.vector.scalings)} layers, rank {', '.join(map(str, ranks))}; base model "
            f"{config['base_model_name_or_path'] or 'not named (--base names it)'}"
        )
        console.print(f"next: PeftModel.from_pretrained(base, {str(out)!r}), or linlora merge BASE {out} --out MERGED")
