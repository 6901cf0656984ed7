"""The main job, `linlora quickstart`: a packaged experiment. LoRA, plain and linearized, trained, fused, compared.

`linlora.experiments` runs it; here are its settings (`settings`) and its data (`glyphs`; `digits` for `linlora compare`
and for `routing`, an experiment of its own). Nothing is downloaded.
"""

from linlora.quickstart.run import run
from linlora.quickstart.settings import CONTROLS, QUICKSTART
from linlora.storage.run_directory import DifferentSettingsError

__all__ = ["CONTROLS", "QUICKSTART", "DifferentSettingsError", "run"]
