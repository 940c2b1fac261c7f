"""Calibration and evaluation text, token windows, the embedded demo model."""

from .demo_model import demo_folder
from .mixture import check_texts, draw_mixture, draw_windows, load_texts
from .sources import KNOWN_SOURCES, TextSource, check_text, load_text
from .windows import (
    BOS_CHOICES,
    DOCUMENT_CHOICES,
    Calibration,
    bos_token,
    check_bos,
    check_documents,
    evaluation_tokens,
)

__all__ = [
    "BOS_CHOICES",
    "DOCUMENT_CHOICES",
    "KNOWN_SOURCES",
    "Calibration",
    "TextSource",
    "bos_token",
    "check_bos",
    "check_documents",
    "check_text",
    "check_texts",
    "demo_folder",
    "draw_mixture",
    "draw_windows",
    "evaluation_tokens",
    "load_text",
    "load_texts",
]
