"""The house has floors: imports go down, none comes back, and the picture of docs/architecture.md shows them."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
architecture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architecture)


@pytest.fixture(scope="module")
def imports():
    return architecture.read_imports()


def test_every_module_stands_in_a_room_of_the_table(imports):
    rooms = {architecture.room(name) for name in imports} - {""}
    assert rooms == set(architecture.floors()), "FLOORS of docs/architecture.py and the folders differ"


def test_no_import_comes_back_to_where_it_began(imports):
    path = architecture.circle(imports)
    assert not path, " -> ".join(path)


def test_rooms_import_from_floors_below(imports):
    found = architecture.not_down(imports)
    assert not found, "\n".join(found)


def test_the_picture_shows_the_imports_as_they_are():
    drawn = json.loads((DOCS / "architecture.json").read_text("utf-8"))
    assert drawn == architecture.data(), "run: python docs/architecture.py"


def test_a_circle_is_found_with_its_path():
    assert architecture.circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_an_import_upwards_is_named():
    (sentence,) = architecture.not_down({"linlora.kernels.tiles": {"linlora.ops.backends"}})
    assert sentence.startswith("linlora.kernels.tiles imports linlora.ops.backends")


def test_deferred_imports_imports_for_types_and_public_names_count(tmp_path, monkeypatch):
    (tmp_path / "linlora").mkdir()
    (tmp_path / "linlora" / "__init__.py").write_text("")
    (tmp_path / "linlora" / "__init__.pyi").write_text("from .c import name as name\n")
    (tmp_path / "linlora" / "a.py").write_text("def f():\n    from linlora import b\n")
    (tmp_path / "linlora" / "b.py").write_text("if TYPE_CHECKING:\n    from linlora.c import name\n")
    (tmp_path / "linlora" / "c.py").write_text("import linlora\nlinlora.name\n")
    (tmp_path / "linlora" / "d.py").write_text("import linlora\nlinlora.name\nfrom . import a\n")
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    monkeypatch.setattr(architecture, "PACKAGES", {"linlora": tmp_path / "linlora"})
    imports = {name.removeprefix("linlora."): targets for name, targets in architecture.read_imports().items()}
    assert imports["a"] == {"linlora.b"}
    assert imports["b"] == {"linlora.c"}
    assert imports["c"] == set()
    assert imports["d"] == {"linlora.a", "linlora.c"}
