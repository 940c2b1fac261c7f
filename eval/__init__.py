"""Perplexity, benchmarks and reports."""
