"""The quickstart's data: a backbone pre-trained on printed characters, tasks of unseen scripts, zero-shot heads."""

from linlora.quickstart.glyphs.heads import Classifier, Head, classifier
from linlora.quickstart.glyphs.images import Split, Task, tasks
from linlora.quickstart.glyphs.sheet import contact_sheet
from linlora.quickstart.glyphs.vit import backbone

__all__ = ["Classifier", "Head", "Split", "Task", "backbone", "classifier", "contact_sheet", "tasks"]
