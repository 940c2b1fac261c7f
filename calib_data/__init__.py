"""Calibration and evaluation text, token windows, the embedded demo model."""

from .demo_model import demo_folder
from .sources import KNOWN_SOURCES, TextSource, check_text, load_text
from .windows import BOS_CHOICES, Calibration, bos_token, check_bos, draw_windows, evaluation_tokens

__all__ = [
    "BOS_CHOICES",
    "KNOWN_SOURCES",
    "Calibration",
    "TextSource",
    "bos_token",
    "check_bos",
    "check_text",
    "demo_folder",
    "draw_windows",
    "evaluation_tokens",
    "load_text",
]
