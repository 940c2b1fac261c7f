"""`python -m sparsegpt`."""

import gc

from sparsegpt.cli.commands import main

# What is imported stays to the end: no collection needs to look at it, not even the last (a quarter of `--help`).
gc.freeze()
main()
