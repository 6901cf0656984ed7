"""The commands of `linlora`, one file each; `linlora.cli` assembles them.

A command is a function that typer can call. It imports what it needs when it runs, so that `--help` is quick, and
runs it under `user_errors`, which prints what a user can act on as one line.
"""
