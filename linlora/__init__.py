"""linlora: linearized LoRA fine-tuning at the cost of plain LoRA.

Fused kernels compute a LoRA layer together with its tangent; a thin layer over PEFT linearizes, trains, fuses, merges
and exports. Start with `linlora.linearize`.
"""

from linlora import baselines, formats, functional, reference, routing, testing
from linlora.backends import BackendUnavailableError, explain, use_backend
from linlora.export import export, merge
from linlora.files import CorruptFileError
from linlora.fusion import fuse
from linlora.linearize import (
    NoLoraLayerError,
    Report,
    UnsupportedLayerError,
    accelerate,
    delinearize,
    linearize,
    set_scope,
)
from linlora.stream import TangentError
from linlora.task_vector import DifferentPointError, TaskVector, apply
from linlora.weight_vector import WeightVector

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CorruptFileError",
    "DifferentPointError",
    "NoLoraLayerError",
    "Report",
    "TangentError",
    "TaskVector",
    "UnsupportedLayerError",
    "WeightVector",
    "accelerate",
    "apply",
    "baselines",
    "delinearize",
    "explain",
    "export",
    "formats",
    "functional",
    "fuse",
    "linearize",
    "merge",
    "reference",
    "routing",
    "set_scope",
    "testing",
    "use_backend",
]
