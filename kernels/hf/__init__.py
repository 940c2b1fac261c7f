"""Packed models through transformers. This file imports nothing, so that transformers stays unloaded."""
