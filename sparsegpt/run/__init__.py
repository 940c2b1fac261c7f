"""The job behind `python -m sparsegpt run`: its options, what it needs, where it keeps unfinished work."""
