"""The rooms of the house: their order, the imports between them, and the picture in architecture.md.

    python docs/architecture.py      reads the imports, draws docs/architecture.svg and writes docs/architecture.json

An import counts wherever it stands: at the top of a file, inside a function, for types alone, or as `linlora.NAME`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

FLOORS: tuple[dict[str, str], ...] = (
    {"cli": "one line a command"},
    {"commands": "arguments in, messages out"},
    {"bench": "measurements, tuning"},
    {"quickstart": "the packaged experiments"},
    {"experiments": "families and methods, run"},
    {"merging": "adapters into a model", "training": "recipes, data, the Trainer", "routing": "inventories of skills"},
    {"formats": "adapters in files", "fusion": "methods that fuse vectors", "functional": "ops for your own layers"},
    {"vectors": "task vectors, their algebra"},
    {"layers": "PEFT layers; linearize"},
    {"stream": "both streams, any network"},
    {"ops": "one file an op; dispatch"},
    {"kernels": "Triton, one file an op"},
    {
        "reference": "the formulas",
        "storage": "whole files or none",
        "testing": "tiny models",
        "baselines": "torch.func",
    },
)
"""The rooms from the top floor down, each with its purpose. A file imports from floors below its own."""

PACKAGES = {"linlora": ROOT / "linlora", "linlora.bench": ROOT / "bench", "linlora.kernels": ROOT / "kernels"}
Imports = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    files = modules()
    stub = ROOT / "linlora" / "__init__.pyi"
    public = dict(_from_imports(ast.parse(stub.read_text("utf-8")), "linlora", files))
    return {name: set(_imported(name, path, files, public)) - {name} for name, path in files.items()}


def _imported(name: str, path: Path, files: Mapping[str, Path], public: Mapping[str, str]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text("utf-8"))
    for imported, target in _from_imports(tree, package, files):
        yield public.get(imported, target) if target == "linlora" else target
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files and alias.name != "linlora")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "linlora":
            yield from (public[node.attr],) if node.attr in public else ()


def _from_imports(tree: ast.AST, package: str, files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, module) of every `from module import name` whose module is one of the package's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in files:
                    yield alias.name, f"{source}.{alias.name}"
                elif source in files:
                    yield alias.name, source


def circle(imports: Imports) -> list[str]:
    """A path of imports that comes back to where it began, or nothing."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for target in sorted(imports.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in done and (found := walk([*path, target])):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(imports) if name not in done and (found := walk([name]))), [])


def room(module: str) -> str:
    """The room of a module: the part of its name behind `linlora`. The package's face has none."""
    return module.split(".")[1] if "." in module else ""


def floors() -> dict[str, int]:
    """The floor of every room, counted from the top."""
    return {name: number for number, floor in enumerate(FLOORS) for name in floor}


def not_down(imports: Imports) -> list[str]:
    """The imports that do not go to a floor below, each as a sentence."""
    floor = floors()
    return [
        f"{name} imports {target}: '{room(name)}' does not stand above '{room(target)}'"
        for name, targets in sorted(imports.items())
        for target in sorted(targets)
        if room(name) and room(target) and room(name) != room(target) and floor[room(name)] >= floor[room(target)]
    ]


def arrows(imports: Imports) -> list[tuple[str, str]]:
    """The imports between rooms, without those that follow from others."""
    below: dict[str, set[str]] = {name: set() for name in floors()}
    for name, targets in imports.items():
        below.get(room(name), set()).update({room(target) for target in targets} - {room(name), ""})
    reached = {name: set(_reached(below, targets)) for name, targets in below.items()}
    return [
        (name, target)
        for name, targets in below.items()
        for target in sorted(targets)
        if not any(target in reached[other] for other in targets)
    ]


def _reached(below: Imports, rooms: Iterable[str]) -> Iterator[str]:
    waiting, seen = list(rooms), set(rooms)
    while waiting:
        yield (name := waiting.pop())
        waiting += (new := below[name] - seen)
        seen |= new


def data() -> dict[str, list]:
    """The content of the picture."""
    return {"floors": [list(floor) for floor in FLOORS], "arrows": [list(arrow) for arrow in arrows(read_imports())]}


def draw(content: dict[str, list], path: Path) -> None:
    """Draw the rooms by floors, with an arrow to those that a room needs; all may use the ground floor."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    *upper, ground = content["floors"]
    width, height, step = 2.9, 0.66, 1.05
    places = {}
    for row, names in enumerate(upper):
        first = -1 if len(names) == 3 else 0
        places.update({name: ((first + column) * (width + 0.5), -step * row) for column, name in enumerate(names)})
    for column, name in enumerate(ground):
        places[name] = ((column - (len(ground) - 1) / 2) * (width + 0.15), -step * len(upper) - 0.2)
    figure, axes = pyplot.subplots(figsize=(9.6, 8.6))
    for name, target in content["arrows"]:
        (x, y), (u, v) = places[name], places[target]
        if target in ground:
            continue
        bend = 0.0 if y - v < 1.5 * step else (0.25 if x > 0 or u > 0 else -0.25)
        style = {"arrowstyle": "-|>", "color": "#5b6b7f", "lw": 1.1, "connectionstyle": f"arc3,rad={-bend}"}
        axes.annotate("", (u, v + height / 2), (x, y - height / 2), arrowprops=style, zorder=1)
    for name, (x, y) in places.items():
        corner = (x - width / 2, y - height / 2)
        colours = {"fc": "#f4f1ea", "ec": "#8a7a55"} if name in ground else {"fc": "#eef3fa", "ec": "#2f4b7c"}
        look = {"boxstyle": "round,pad=0.02,rounding_size=0.1", **colours}
        axes.add_patch(FancyBboxPatch(corner, width, height, **look, zorder=2))
        axes.text(x, y + 0.13, name, ha="center", va="center", weight="bold", size=10, zorder=3)
        purpose = next(floor[name] for floor in FLOORS if name in floor)
        axes.text(x, y - 0.16, purpose, ha="center", va="center", size=8, color="#333333", zorder=3)
    axes.set_xlim(-6.2, 6.2)
    axes.set_ylim(-step * len(upper) - 0.7, 0.5)
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "linlora"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    content = data()
    (HERE / "architecture.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    draw(content, HERE / "architecture.svg")
    print(f"{len(floors())} rooms, {len(content['arrows'])} arrows")
