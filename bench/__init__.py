"""The benchmark: linlora against `torch.func.jvp`, PEFT and the frozen layer, at the shapes of real models.

`linlora bench` runs it; NOTES.md keeps what was learned; results/<gpu>/ holds the runs that prove a backend.
"""
