"""Calibration and evaluation text, token windows, the embedded demo model."""

from .demo_model import demo_folder
from .sources import KNOWN_SOURCES, TextSource, load_text
from .windows import Calibration, draw_windows, evaluation_tokens

__all__ = [
    "KNOWN_SOURCES",
    "Calibration",
    "TextSource",
    "demo_folder",
    "draw_windows",
    "evaluation_tokens",
    "load_text",
]
