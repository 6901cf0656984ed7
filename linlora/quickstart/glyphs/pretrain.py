"""Pre-trains the backbone: `python -m linlora.quickstart.glyphs.pretrain FOLDER` writes FOLDER/backbone.

A cosine softmax over the characters of `letters.pretraining_classes`, drawn anew for every step. Every hundred steps
the state goes to FOLDER, and the same command continues from there. Step and seed alone decide what is drawn, and the
learning rate falls by steps, so an interrupted run and an uninterrupted one do the same; another machine rounds
otherwise, and ends at other bits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, nn
from torch.nn.functional import cross_entropy, linear, normalize

from linlora.quickstart.glyphs.drawing import plain
from linlora.quickstart.glyphs.fonts import TRAINING_FACES, Characters
from linlora.quickstart.glyphs.letters import pretraining_classes
from linlora.quickstart.glyphs.scripts import SCRIPTS
from linlora.quickstart.glyphs.vit import SCALE, WIDTH, new_backbone, pooled
from linlora.training.checkpoints import quiet

STEPS = 2000
BATCH = 96
LEARNING_RATE = 2e-3
WARM_UP = 100
WEIGHT_DECAY = 0.05

_STATE = "pretraining.pt"


def learning_rate(step: int, steps: int) -> float:
    """Rises over the first steps, then falls along a cosine to zero."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def pretrain(folder: Path, characters: Sequence[str], steps: int = STEPS, every: int = 100) -> Path:
    """Train, or go on with training, in a folder; returns the folder of the backbone, in fp16.

    Every so many steps the state is kept and the accuracy since then is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Characters(characters, TRAINING_FACES)
    backbone = new_backbone()
    head = nn.Linear(WIDTH, len(characters), bias=False)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    first = 0
    if (folder / _STATE).exists():
        state = torch.load(folder / _STATE, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["steps"]
    right = 0
    for step in range(first, steps):
        generator = Generator().manual_seed(step)
        classes = torch.randint(len(characters), (BATCH,), generator=generator)
        images = plain(drawn.draw(classes, generator), generator)
        tokens = backbone(pixel_values=images).last_hidden_state
        logits = SCALE * linear(normalize(pooled(tokens), dim=-1), normalize(head.weight, dim=-1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        cross_entropy(logits, classes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right += int((logits.argmax(-1) == classes).sum())
        if (step + 1) % every == 0:
            print(f"step {step + 1}: accuracy {right / (every * BATCH):.3f}", flush=True)
            right = 0
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}
            torch.save(state, folder / f"{_STATE}.unfinished")
            (folder / f"{_STATE}.unfinished").replace(folder / _STATE)
    with quiet():
        backbone.half().save_pretrained(folder / "backbone")
    found = hashlib.sha256((folder / "backbone" / "model.safetensors").read_bytes()).hexdigest()
    print(f"{folder / 'backbone'}, SHA-256 {found}")
    return folder / "backbone"


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the backbone of the quickstart.")
    parser.add_argument("folder", type=Path, help="where the state and the backbone go")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    characters = pretraining_classes([letter for script in SCRIPTS for letter in script.letters])
    print(f"{len(characters)} classes")
    pretrain(folder, characters)


if __name__ == "__main__":
    main()
