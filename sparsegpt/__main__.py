"""`python -m sparsegpt`."""

from sparsegpt.cli import main

main()
