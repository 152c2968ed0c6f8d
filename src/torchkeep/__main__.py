"""``python -m torchkeep`` is the command line."""

from .cli import main

main()
