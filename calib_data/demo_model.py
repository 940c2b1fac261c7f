"""The embedded demo model: a small OPT that needs no network, for a first run and for the tests."""

from pathlib import Path


def demo_folder() -> Path:
    """Hugging Face folder of the demo model (weights, configuration, tokenizer)."""
    return Path(__file__).parent / "demo"
