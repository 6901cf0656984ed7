"""`python -m linlora.bench` is `linlora bench`."""

from linlora.bench.cli import app

app(prog_name="linlora bench")
