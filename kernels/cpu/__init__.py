"""Kernels for a CPU: C++, built on demand, one file a family, called through ctypes (library.py)."""
