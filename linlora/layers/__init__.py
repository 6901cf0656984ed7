"""PEFT layers on the fused ops: how one is made, how it runs, and whole models of them."""
