"""The quickstart's data: a backbone pre-trained on printed characters, tasks of unseen scripts, zero-shot heads."""

from linlora.quickstart.glyphs.heads import Network, head, network
from linlora.quickstart.glyphs.images import Task, tasks
from linlora.quickstart.glyphs.sheet import contact_sheet
from linlora.quickstart.glyphs.suite import Glyphs
from linlora.quickstart.glyphs.vit import backbone

__all__ = ["Glyphs", "Network", "Task", "backbone", "contact_sheet", "head", "network", "tasks"]
