"""Triton kernels, one file each, and torch's own 2:4 kernels."""
