"""Bases in which pruning costs less, merged into ordinary weights."""
