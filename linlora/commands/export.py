"""`linlora export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import refuse_missing, user_errors
from linlora.storage.staging import refuse_existing


def export(
    vector: Annotated[Path, typer.Argument(help="A task vector, or the folder of an adapter of any format.")],
    out: Annotated[Path, typer.Option(help="The folder of the PEFT adapter; it must not exist.")],
    base: Annotated[
        str | None, typer.Option(help="Base model (hub id or folder), or the folder of an adapter of it.")
    ] = None,
    cast: Annotated[
        str | None,
        typer.Option(help="layer: the same (dA, dB) as a layer-scope adapter, which is another function."),
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload the adapter as OWNER/NAME.")] = None,
) -> None:
    """Write a task vector as a PEFT adapter that stock PEFT, vLLM and SGLang load, of exactly the same function.

    With --base the adapter names its base model; a folder is checked for the layers of the vector. The configuration
    of an adapter (task type, trained head, class names) is taken over. A vector of model scope is no LoRA adapter: with
    --cast layer its values are exported as one, which scores differently.
    """
    with user_errors():
        refuse_missing([vector])
        refuse_existing(out)
        if cast not in (None, "layer"):
            raise ValueError(f"--cast {cast}: the one cast that exports is to 'layer'")
        _export(vector, out, base, cast, push_to_hub)


def _export(vector: Path, out: Path, base: str | None, cast: str | None, repository: str | None) -> None:
    from dataclasses import replace

    from rich.console import Console

    from linlora import formats
    from linlora.commands.hub import push
    from linlora.formats.adapter_config import read_config
    from linlora.formats.export import export_stored
    from linlora.training.card import write_card_of_export

    stored = formats.open(vector)
    scope = stored.vector.scope
    if scope == "model" and cast is None:
        raise ValueError(
            f"{vector} has the function of a network linearized as a whole (scope 'model'), which no LoRA adapter has. "
            "Run it in linlora (linlora eval), or export the layer-scope function of its values with --cast layer"
        )
    if cast is not None:
        stored = replace(stored, vector=stored.vector.cast(cast))
    export_stored(stored, out, base)
    config = read_config(out)
    ranks = sorted({config["r"], *config["rank_pattern"].values()})
    base_model = config["base_model_name_or_path"]
    write_card_of_export(stored, out, base_model, cast)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{out}: {len(stored.vector.scalings)} layers, rank {', '.join(map(str, ranks))}; base model "
        f"{base_model or 'not named (--base names it)'}"
    )
    if cast is not None and scope != cast:
        console.print(f"note: the values of a vector of scope '{scope}' as a layer-scope adapter, another function")
    if repository is not None:
        console.print(f"uploaded to {push(out, repository)}")
    console.print(f"next:\n  linlora inspect {shlex.quote(str(out))}")
    if base_model and Path(base_model).is_dir():
        merged = shlex.quote(f"{out}-merged")
        console.print(f"  linlora merge {shlex.quote(base_model)} {shlex.quote(str(out))} --out {merged}")
