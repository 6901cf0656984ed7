"""`linlora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linlora.commands.errors import refuse_missing, user_errors
from linlora.commands.methods import METHOD_HELP


def evaluate(
    vectors: Annotated[list[Path], typer.Argument(help="Folders of runs; with --on any task vector or adapter.")],
    split: Annotated[str, typer.Option(help="validation, test or train.")] = "test",
    fuse: Annotated[
        str | None, typer.Option(help=f"{METHOD_HELP} With data also regmean, soup, lorahub, adamerging.")
    ] = None,
    scaling: Annotated[float | None, typer.Option(help="The method's option scaling.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other option of the method: --set keep=0.2 (repeatable).")
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Search options on the validation split, also where --set scaling=[0.1,0.3] says."
        ),
    ] = False,
    on: Annotated[
        list[Path] | None,
        typer.Option(help="Score by the data of this run or recipe (repeatable), not of the vectors' runs."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model of all vectors, where they name it differently.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of the scores; beside the vectors if left out.")] = None,
) -> None:
    """Score trained adapters on their data sets, alone or fused into one.

    Fused: the table shows the backbone, the average, each task's own run, the fused vector, and the one over the other.
    A search also shows what every λ scored on the validation split, with a picture beside the JSON.
    """
    with user_errors():
        from linlora.training.recipe import assigned

        options = {**({} if scaling is None else {"scaling": scaling}), **dict(assigned(set_ or []))}
        if fuse is None and (options or search):
            raise ValueError("--scaling, --set and --search are of a method; name it with --fuse")
        if base and not (fuse or on):
            raise ValueError("--base is of vectors that are fused, or scored --on other data")
        if fuse is None and on and len(vectors) > 1:
            raise ValueError("--on scores one vector, or the vectors fused by --fuse; name one vector, or a method")
        path = out or _beside(vectors, fuse, split)
        if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
            raise FileExistsError(f"--out {path}: a JSON file is written there; name another")
        refuse_missing([*vectors, *(on or [])])
        from linlora.commands.surroundings import quiet

        with quiet():
            result = _scores(vectors, split, fuse, options, search, on or [], base)
            _show({"vectors": [str(vector) for vector in vectors], **result}, path)


def _scores(
    vectors: list[Path], split: str, method: str | None, options: dict, search: bool, on: list[Path], base: str | None
) -> dict[str, Any]:
    from rich.console import Console

    from linlora import formats
    from linlora.experiments import evaluation, judges
    from linlora.experiments.controls import ON_WEIGHTS
    from linlora.vectors.common_space import in_one_space

    read = [formats.read(vector) for vector in vectors]
    tasks, console = judges.judges(on or vectors), Console()
    if method is None and not on:
        return evaluation.evaluate_alone(tasks, split)
    plain = method in ON_WEIGHTS and {vector.scope for vector in read} == {"lora"}
    together, note = in_one_space(read, [str(vector) for vector in vectors], "weight" if plain else None, base)
    if note:
        console.print(f"note: {note}", highlight=False)
    if method is None:
        return evaluation.evaluate_vector(together[0], tasks, split)
    return evaluation.evaluate_fused(together, tasks, split, method, options, search, not on, console)


def _show(result: dict[str, Any], path: Path) -> None:
    import json

    from rich.console import Console

    from linlora.experiments import evaluation
    from linlora.storage.files import write_text

    console, written = Console(), [str(path)]
    write_text(path, json.dumps(result, indent=2) + "\n")
    if result["search"]:
        console.print(evaluation.searched(result))
        picture = path.with_suffix(".png")
        written += [str(picture)] if evaluation.draw(result, picture) else []
    console.print(evaluation.evaluated(result))
    console.print(f"written to {' and '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def _beside(vectors: list[Path], method: str | None, split: str) -> Path:
    """In the folder of a run; of several, or of what is no run, beside it, where a `*` of runs does not look."""
    if len(vectors) == 1 and vectors[0].is_dir():  # no import, of torch with it, for a path that is not there
        from linlora.storage.run_directory import TRAINING_FILE

        if (vectors[0] / TRAINING_FILE).exists():
            return vectors[0] / f"eval-{split}.json"
    together = vectors[0] if len(vectors) == 1 else vectors[0].parent
    return together.parent / "-".join(part for part in (together.stem, method or "eval", f"{split}.json") if part)
