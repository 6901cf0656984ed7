"""Reads adapters in files, whoever wrote them, as task vectors.

    a task vector           `TaskVector.save`                      (dA, dB), the point, scope, scaling
    a linlora folder        `linlora.export`                       a task vector beside the PEFT adapter it is
    a PEFT adapter          `save_pretrained`, of any age          ΔW = s B A: a vector of scope "weight"
    an L-LoRA checkpoint    arXiv 2310.04742's successor library   (A, B) and (A0, B0): a vector of scope "layer"

Only tensors are read: no code in a file is run.
"""

from linlora.formats.opening import open, read
from linlora.formats.stored import Stored

__all__ = ["Stored", "open", "read"]
