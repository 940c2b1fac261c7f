"""Figures: drawn without a screen, written as PNG and SVG."""

from pathlib import Path
from typing import Any


def new_figure(*panels: int, **options: Any) -> tuple[Any, Any]:
    """A figure, and an array of its panels, [rows, columns]; options of matplotlib's `subplots`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*panels, layout="constrained", squeeze=False, **options)
    return figure, axes


def saved(figure: Any, path: Path) -> list[Path]:
    """Write a figure, whatever the suffix of the path, as .png and .svg; returns both paths."""
    import matplotlib.pyplot as plt

    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        figure.savefig(target, dpi=150)
    plt.close(figure)
    return written
