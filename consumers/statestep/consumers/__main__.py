"""`python -m statestep.consumers` is `statestep`."""

from statestep.consumers.cli import main

main()
