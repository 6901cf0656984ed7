"""`linlora quickstart --routing`: an inventory of skills trained on many tasks, then few-shot adaptation to new ones.

Thirty tasks, each a question about a handwritten digit in one of the quickstart's domains. On twenty-four of them
inventories are trained (shared, Poly, MHR). The other six combine a known question with a known domain anew; a few
labelled images of each are what LoRA, all the ways of using an inventory, and their linearized forms adapt to. Read
`run.py` first; `methods.py` is the table of what is compared.
"""

from linlora.quickstart.routing.run import run
from linlora.quickstart.routing.settings import RoutingSettings

__all__ = ["RoutingSettings", "run"]
