"""`python -m neuronsurgery`: see `neuronsurgery.cli`."""

from neuronsurgery.cli import app

app(prog_name="python -m neuronsurgery")
