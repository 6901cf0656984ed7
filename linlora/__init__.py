"""linlora: linearized LoRA fine-tuning at the cost of plain LoRA.

Fused kernels compute a LoRA layer together with its tangent; a thin layer over PEFT linearizes, trains, fuses, merges
and exports. Start with `linlora.linearize`.

`__init__.pyi` lists the public names. Each is imported when it is first asked for.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
