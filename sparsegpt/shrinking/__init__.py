"""Smaller dense models: whole heads, channels, experts and blocks leave, and an ordinary model stays."""
