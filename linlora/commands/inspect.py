"""`linlora inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linlora.commands.errors import refuse_missing, user_errors

if TYPE_CHECKING:
    from rich.table import Table

    from linlora.formats import Stored


def inspect(
    path: Annotated[Path, typer.Argument(help="A task vector, or the folder of an adapter of any format.")],
) -> None:
    """Say what an adapter in a file or folder is, whether it is whole, and what it goes with.

    Every tensor is read and checked; the exit status is 2 where the file is damaged or foreign.
    """
    with user_errors():
        refuse_missing([path])
        from rich.console import Console

        from linlora import formats

        stored = formats.open(path)
        table = _layers(stored)
        console = Console(soft_wrap=True)
        console.print(_summary(stored), highlight=False, markup=False)
        console.width = max(console.width, Console(width=1000).measure(table).maximum)  # no name is cut short
        console.print(table)


def _summary(stored: Stored) -> str:
    """A description in lines of a name and a value."""
    from linlora.storage.tensors import shapes

    vector = stored.vector
    like = shapes(vector.deltas)
    numbers = sum(tensor.numel() for tensor in like.values())
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in like.values()}))
    start = "not in the file, its hash alone" if vector.point is None else "zero" if not vector.point else "in the file"
    start, adds_to = f"{start}; SHA-256 {vector.point_hash[:16]}", f"that start at {vector.point_hash[:16]}"
    if vector.scope == "weight":
        start, adds_to = "none: it is relative to the base weights", "of the same base model, whatever their layers"
    extras = [f"beside it  {', '.join(stored.extras)} (trained, no part of the vector)"] if stored.extras else []
    return "\n".join(
        [
            f"{stored.path}: {stored.kind}",
            f"base model  {vector.base_model or 'not named'}",
            f"scope       {vector.scope}: {_SCOPES[vector.scope]}",
            f"start       {start}",
            f"adds to     vectors of scope '{vector.scope}' {adds_to}",
            f"values      {numbers:,} in {len(vector.scalings)} layers, {dtypes}, all finite",
            *extras,
            *(f"note        {note}" for note in stored.notes),
        ]
    )


_SCOPES = {
    "lora": "plain LoRA; becomes a vector of the tangent space by cast()",
    "weight": "what adapters add to the weights, ΔW = s B A; exports and merges exactly",
    "layer": "linearized layer by layer; exports to stock PEFT and merges into weights exactly",
    "model": "the network linearized as a whole; runs in linlora with both streams",
}


def _layers(stored: Stored) -> Table:
    """A row for each layer; reads, and so checks, every tensor."""
    from rich.table import Table

    from linlora.vectors.factors import change_of_weight

    vector = stored.vector
    table = Table("layer", "K → N", "rank", "scaling", "‖dA‖", "‖dB‖", "‖change of W‖", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, scaling in sorted(vector.scalings.items()):
        dA, dB = (vector.deltas.get(f"{layer}.{kind}") for kind in ("dA", "dB"))
        assert dB is not None
        change = None if vector.point is None else change_of_weight(vector, layer)
        table.add_row(
            layer,
            "-" if change is None else f"{change.A.shape[1]} → {change.B.shape[0]}",
            str(dB.shape[1]),
            f"{scaling:g}",
            "-" if dA is None else f"{dA.double().norm():.4g}",
            f"{dB.double().norm():.4g}",
            "-" if change is None else f"{change.norm():.4g}",
        )
    return table
