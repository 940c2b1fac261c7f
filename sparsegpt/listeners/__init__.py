"""Who listens to a run: bars for notebooks, a log for machines, and the time left that both tell."""
