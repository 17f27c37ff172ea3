"""`python -m marl`: see `marl.cli`."""

from marl.cli import app

app(prog_name="python -m marl")
