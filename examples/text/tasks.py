"""Writes five text classification tasks of what is installed with linlora: `python tasks.py FOLDER`.

    area        a sentence of SciPy's documentation -> the part of SciPy
    library     a sentence of a docstring, names of libraries blanked out -> the library
    module      a sentence of a docstring of Python's standard library -> the module
    language    a name of a currency, country or language, as its speakers write it -> the language
    character   the name of a Unicode character -> its general category

Each has files train.csv, validation.csv and test.csv, of the columns "text" and "label"; `linlora quickstart
--text` reads train and test. The rows depend on the versions of the packages alone; no text is in two splits.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import inspect
import pkgutil
import random
import re
import sys
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SIZES = {"train": 600, "validation": 100, "test": 200}
AREAS = ("cluster", "fft", "integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial",
         "special", "stats")  # fmt: skip
LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "sklearn", "sympy", "torch", "transformers")
MODULES = ("argparse", "asyncio", "ctypes", "decimal", "email", "http", "importlib", "logging", "multiprocessing", 
           "pathlib", "unittest", "urllib", "xml", "zipfile")  # fmt: skip
LANGUAGES = ("da", "de", "es", "et", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv")
CATEGORIES = {"Lo": "letter", "Mn": "mark", "Mc": "spacing mark", "Nd": "digit", "No": "other number",
              "Po": "punctuation", "Sm": "mathematical symbol", "So": "other symbol"}  # fmt: skip


def objects(package: str) -> Iterator[object]:
    """The functions and classes of a package and its public modules, and the classes' methods, with docstrings."""
    module, seen = importlib.import_module(package), set()
    for name in (
        package,
        *(f"{package}.{found.name}" for found in pkgutil.iter_modules(getattr(module, "__path__", []))),
    ):
        try:
            with contextlib.redirect_stdout(None):
                members = vars(importlib.import_module(name)) if "._" not in name and "test" not in name else {}
        except Exception:  # of modules that need what is not installed
            continue
        for member in list(members.values()):
            if not str(getattr(member, "__module__", "")).startswith(package.split(".")[0]):
                continue
            for found in (member, *(vars(member).values() if inspect.isclass(member) else ())):
                if callable(found) and getattr(found, "__doc__", None) and id(found) not in seen:
                    seen.add(id(found))
                    yield found


def sentences(found: object) -> list[str]:
    """The sentences of the first two paragraphs of a docstring."""
    text = " ".join(" ".join(inspect.cleandoc(str(found.__doc__)).split("\n\n")[:2]).split())
    return [part for part in re.split(r"(?<=[.])\s", text) if 25 <= len(part) <= 250 and ">>>" not in part]


def area() -> Iterator[tuple[str, str]]:
    for name in AREAS:
        for found in objects(f"scipy.{name}"):
            yield from ((text, name) for text in sentences(found))


def library() -> Iterator[tuple[str, str]]:
    names = re.compile(rf"\b({'|'.join((*LIBRARIES, 'scikit-learn', 'scipy', 'np', 'plt'))})\b", flags=re.I)
    for name in LIBRARIES:
        for found in objects(name):
            yield from ((names.sub("_", text), name) for text in sentences(found))


def module() -> Iterator[tuple[str, str]]:
    for name in MODULES:
        for found in objects(name):
            yield from ((text, name) for text in sentences(found))


def language() -> Iterator[tuple[str, str]]:
    from babel import Locale

    for name in LANGUAGES:
        locale = Locale(name)
        for words in (locale.currencies, locale.territories, locale.languages):
            yield from ((text, locale.english_name or name) for text in words.values() if len(text) > 3)


def character() -> Iterator[tuple[str, str]]:
    marks = re.compile(r"\b(CAPITAL|SMALL|MODIFIER|LETTER|DIGIT|SIGN|SYMBOL|NUMBER|MARK|COMBINING|VOWEL)\b ?")
    for code in range(0x20, 0x1FAFF):
        name, label = unicodedata.name(chr(code), ""), CATEGORIES.get(unicodedata.category(chr(code)))
        if label and not name.startswith(("CJK", "HANGUL", "EGYPTIAN", "ANATOLIAN", "BAMUM", "TANGUT", "CUNEIFORM")):
            yield marks.sub("", name).strip().lower(), label


def rows_of(task: str) -> list[tuple[str, str]]:
    """Texts of one label, shuffled, as many of each class as possible."""
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in globals()[task]():
        labels[text].add(label)
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, found in sorted(labels.items()):
        if len(found) == 1 and text.strip():
            by_label[min(found)].append(text)
    draw = random.Random(task)
    for texts in by_label.values():
        draw.shuffle(texts)
    count = sum(SIZES.values())
    rows: list[tuple[str, str]] = []
    for turn in range(max(map(len, by_label.values()))):
        rows += [(texts[turn], label) for label, texts in sorted(by_label.items()) if turn < len(texts)]
    rows = rows[:count]
    draw.shuffle(rows)
    return rows


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for task in ("area", "library", "module", "language", "character"):
        rows = rows_of(task)
        print(f"{task}: {len(rows)} rows, {len({label for _, label in rows})} classes")
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, size in SIZES.items():
            with (folder / task / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("text", "label"))
                writer.writerows(rows[:size])
            rows = rows[size:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
