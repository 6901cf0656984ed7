"""Routing: layers whose adapters are mixtures of an inventory of skills (Poly, MHR; arXiv 2211.03831).

The op is `linlora.functional.routed_lora_linear`; here is what is made for it: an inventory and its base point.
"""

from linlora.routing.inventory import Centered, average, center

__all__ = ["Centered", "average", "center"]
