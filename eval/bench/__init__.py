"""Every benchmark, each side by side in one run, and their tables."""
