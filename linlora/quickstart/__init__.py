"""The main job, `linlora quickstart`: LoRA, plain and linearized at layer and at model scope, trained, fused, compared.

A small transformers ViT is pre-trained on scikit-learn's handwritten digits; adapters are fine-tuned from it for six
tasks, each a question about the digit in a domain of its own; each of the three families is fused and evaluated. All
that concerns one adapter or one fusion is a job, done by one of a few worker processes. Nothing is downloaded. Read
`run.py` first: it names the phases in order.
"""

from linlora.quickstart.run import run
from linlora.quickstart.settings import Settings
from linlora.storage.run_directory import DifferentSettingsError

__all__ = ["DifferentSettingsError", "Settings", "run"]
