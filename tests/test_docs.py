"""The pages of docs/: their Python runs, their links lead somewhere, and the generated ones are complete."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from linlora.training import Data, Settings, recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GENERATED = {"commands.md", "settings.md"}  # by docs/reference.py
BLOCKS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {"__name__": "__docs__"})


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not [link for link in missing if link not in GENERATED]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert not [page.name for page in PAGES if f": {page.name}" not in navigation]


def test_the_recipe_of_the_tutorial_is_two_tasks(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text("utf-8"), flags=re.S)
    (tmp_path / "films.yaml").write_text(text, "utf-8")
    mood, genre = recipe(tmp_path / "films.yaml").values()
    assert (mood.name, mood.data.label, genre.data.label) == ("mood", "mood", "genre")
    assert (mood.out, mood.method, mood.data.text) == ("runs/films/mood", "layer", ("review",))


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_explains_every_key(reference):
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", reference.settings(), flags=re.M)
    assert [key for key, _ in rows] == [field.name for kind in (Settings, Data) for field in dataclasses.fields(kind)]
    assert not [key for key, explanation in rows if len(explanation) < 5]


def test_the_page_of_commands_has_every_command_and_its_options(reference):
    page = reference.commands()
    for title in ("linlora train", "linlora eval", "linlora merge", "linlora tune", "linlora bench run"):
        assert f"## `{title}`\n" in page
    assert "| `--rank` |" in page


def test_checks_before_a_commit_have_the_version_of_the_tests():
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), flags=re.M)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
