"""PEFT layers on linlora's ops: how a layer is converted, how it runs, and whole models of such layers."""
