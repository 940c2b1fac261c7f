"""`python -m sparsegpt`."""

from sparsegpt.cli.commands import main

main()
