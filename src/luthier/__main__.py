"""`python -m luthier`."""

from luthier.cli.main import run

run()
