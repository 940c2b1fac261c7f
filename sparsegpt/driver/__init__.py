"""The driver: a model pruned block by block, and the report of what was done."""
