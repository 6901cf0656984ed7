"""The scripts of the tasks, and the rule that drew their letters and papers.

It was written, and the letters and papers were drawn, before anything was trained on them. Afterwards only the ink was
made darker, so that one can read the glyphs; no fused score had been seen by then.

* Scripts: those of matplotlib's fonts, besides the ones pre-trained on, with ten letters in at least two training and
  two test faces, and written with a pen; without those whose letters are Latin, turned or mirrored (Lisu, Old Italic).
  With the digits of scikit-learn, which people wrote by hand, they are the candidates.
* Letters: a script's, shuffled; the first ten that do not look alike (see `letters.py`).
* Papers: shuffled and dealt in the order of the scripts. The handwriting has none.
* A candidate is a task if one LoRA adapter gains 15 points of validation accuracy with it; how adapters fuse has no
  say.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from linlora.quickstart.glyphs.drawing import PAPERS
from linlora.quickstart.glyphs.fonts import TEST_FACES, TRAINING_FACES, faces_with
from linlora.quickstart.glyphs.letters import distinct

SEED = 2026
LETTERS = 10


@dataclass(frozen=True)
class Script:
    """Ten letters and the paper they are printed on; None for the handwritten digits."""

    name: str
    letters: str
    paper: str | None


SCRIPTS = (
    Script("digits", "0123456789", None),
    Script("arabic", "لغعفحىضةشأ", "weave"),
    Script("syllabics", "ᑧᖂᐂᒂᓭᒸᓦᒋᕖᓋ", "zigzag"),
    Script("georgian", "წუიჰოჭვსქფ", "bricks"),
    Script("hebrew", "צרעמהלנץןף", "ripples"),
    Script("lao", "ຜປງຣດຫຟຊບກ", "squared"),
)


def selected(names: Sequence[str] | None) -> list[Script]:
    """The scripts of the given names, in their order, all for None; a name that none has is an error."""
    known = [script.name for script in SCRIPTS]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no task {', '.join(map(repr, unknown))}; choose from {', '.join(known)}")
    return [script for script in SCRIPTS if names is None or script.name in names]


_BLOCKS = {
    "arabic": (0x621, 0x64A),
    "syllabics": (0x1401, 0x1676),
    "georgian": (0x10D0, 0x10F0),
    "hebrew": (0x5D0, 0x5EA),
    "lao": (0xE81, 0xEAE),
}


def draw() -> dict[str, tuple[str, str]]:
    """Letters and paper of each printed script, by the rule. The result is written down in `SCRIPTS`."""
    papers = list(PAPERS)
    random.Random(SEED).shuffle(papers)
    drawn = {}
    for (name, (first, last)), paper in zip(_BLOCKS.items(), papers, strict=False):
        letters = [chr(point) for point in range(first, last + 1) if _is_candidate(chr(point))]
        random.Random(f"{SEED} {name}").shuffle(letters)
        drawn[name] = ("".join(distinct(letters, count=LETTERS)), paper)
    return drawn


def _is_candidate(character: str) -> bool:
    """A letter that two training and two test faces have."""
    enough = all(len(faces_with(character, faces)) >= 2 for faces in (TRAINING_FACES, TEST_FACES))
    return enough and unicodedata.category(character) in ("Lo", "Ll")
