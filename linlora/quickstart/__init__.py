"""The main job, `linlora quickstart`: plain and linearized LoRA on real data, trained, fused and compared.

A small transformers ViT is pre-trained on scikit-learn's handwritten digits; adapters are fine-tuned from it for six
tasks, each a question about the digit in a domain of its own; each family is fused and evaluated. Nothing is
downloaded. Read `run.py` first: it names the phases in order.
"""

from linlora.quickstart.artifacts import DifferentSettingsError
from linlora.quickstart.run import run
from linlora.quickstart.settings import Settings

__all__ = ["DifferentSettingsError", "Settings", "run"]
