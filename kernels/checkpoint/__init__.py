"""Packed folders on disk: what becomes of each tensor, and what config.json says of it."""
