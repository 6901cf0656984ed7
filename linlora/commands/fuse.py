"""`linlora fuse`."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linlora.commands.errors import refuse_missing, user_errors
from linlora.commands.methods import METHOD_HELP

if TYPE_CHECKING:
    from linlora import TaskVector
    from linlora.formats import Stored


def fuse(
    vectors: Annotated[list[str], typer.Argument(help="Task vectors or adapter folders; then options of the method.")],
    out: Annotated[Path, typer.Option(help="The task vector to write, a .safetensors file.")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "task_arithmetic",
    scope: Annotated[
        str | None, typer.Option(help="weight: fuse what the adapters add to the weights, whatever they are.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model of all adapters, where they name it differently.")
    ] = None,
) -> None:
    """Fuse adapters into one: linlora fuse A B C --method average --out fused.safetensors

    Adapters of one starting point are fused there. Others, of any start, rank, scaling and choice of layers, plain or
    linearized, are fused as what they add to the weights of their base model: Σ λ ΔW.

    The options of the method are those of `linlora.fuse`: --scaling 0.3, or --scaling 0.3,0.5,0.2 for one each; --keep
    for ties; --drop, --seed and --combine for dare; in weight space --out-rank 16 or --energy 0.99 for the best adapter
    of a smaller rank.

    The files are streamed through: memory holds a few tensors, whatever their number. Where λ comes from: `linlora eval
    ... --fuse METHOD --search` on a validation split.
    """
    with user_errors(interrupted="interrupted; nothing was written"):
        first = next((i for i, argument in enumerate(vectors) if argument.startswith("--")), len(vectors))
        refuse_missing(vectors[:first])
        import linlora
        from linlora import formats
        from linlora.fusion.registry import FROM_VECTORS
        from linlora.vectors.common_space import in_one_space

        if method in linlora.fusion.METHODS and method not in FROM_VECTORS:
            raise ValueError(
                f"{method} needs {linlora.fusion.needs(method)} of the tasks, which adapters do not hold: linlora "
                f"compare, or linlora.fuse(vectors, {method!r}, ...) in Python. From files: {', '.join(FROM_VECTORS)}"
            )
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {out}: a task vector is written to a .safetensors file")
        paths, chosen = vectors[:first], options(vectors[first:])
        if any(_is_of(out, Path(path)) for path in paths):
            raise FileExistsError(f"--out {out} is one of the vectors; name another file")
        stored = [formats.open(path) for path in paths]
        of_one_space, note = in_one_space([adapter.vector for adapter in stored], paths, scope, base)
        fused = linlora.fuse(of_one_space, method, **chosen)
        fused.save(out)
        _report(out, fused, len(paths), method, chosen, [*_notes(paths, stored, fused), *([note] if note else [])])


def _notes(paths: list[str], stored: list[Stored], fused: TaskVector) -> Iterator[str]:
    """What a user may not expect of the fused vector."""
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        yield f"given more than once, and counted so: {', '.join(twice)}"
    if fused.scope == "lora":
        yield (
            "plain LoRA adapters of one start are fused factor by factor, Σ dB_i and Σ dA_i: their product "
            "has the cross terms B_i A_j. What they add to the weights has none: --scope weight"
        )
    if extras := sorted({name for adapter in stored for name in adapter.extras}):
        yield f"not fused, trained beside the adapters: {', '.join(extras)}"


def _report(out: Path, fused: TaskVector, number: int, method: str, chosen: dict[str, Any], notes: list[str]) -> None:
    from rich.console import Console

    from linlora import WeightVector
    from linlora.fusion import METHODS

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{out}: {method} of {number} vectors of scope '{fused.scope}', {len(fused.scalings)} layers")
    scaling = chosen.get("scaling", default(METHODS[method], "scaling"))
    if scaling is not None:
        console.print(f"scaling {scaling}")
    if isinstance(fused, WeightVector):
        ranks = sorted({size.rank for size in fused.sizes().values()})
        lost = f"; cut off: {fused.truncation_error:.2%} of the norm" if fused.truncation_error else ", exact"
        asked = chosen.get("out_rank", 0)
        more = f": --out-rank {asked} is more than there is" if asked != "exact" and asked > ranks[-1] else ""
        console.print(f"rank {' to '.join(map(str, ranks[:: max(1, len(ranks) - 1)]))}{lost}{more}")
    for note in notes:
        console.print(f"note: {note}")
    named, folder = shlex.quote(str(out)), shlex.quote(str(out.with_suffix("")))
    cast = " --cast layer" if fused.scope == "model" else ""
    console.print(f"next:\n  linlora inspect {named}\n  linlora export {named}{cast} --out {folder}")


def default(function: Callable[..., Any], option: str) -> Any:
    """The default of an option of a fusion method; None where it has none."""
    parameter = inspect.signature(function).parameters.get(option)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _is_of(out: Path, vector: Path) -> bool:
    """Whether a file is a vector that is read, or is read, or would be, as a part of its folder."""
    from linlora.formats.opening import ADAPTER_FILES

    place, home = out.resolve(), vector.resolve()
    return place == home or (place.parent == home and (place.exists() or place.name in ADAPTER_FILES))


def options(arguments: list[str]) -> dict[str, Any]:
    """Options of a fusion method as they are typed, `--name value` or `--name=value`, as keyword arguments.

    >>> options(["--scaling", "0.3,0.5", "--seed=1", "--combine", "ties"])
    {'scaling': [0.3, 0.5], 'seed': 1, 'combine': 'ties'}
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise ValueError(f"unexpected {name!r}: vectors come first, then options of the method, --name value")
        if not equals and not rest:
            raise ValueError(f"option {name} has no value")
        values = [_value(part) for part in (text if equals else rest.pop(0)).split(",")]
        found[name.removeprefix("--").replace("-", "_")] = values[0] if len(values) == 1 else values
    return found


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
