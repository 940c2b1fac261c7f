"""What the benchmarks are told in the same words, and how they print what they found."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegpt.cli.console import open_console, say
from sparsegpt.errors import SparseGPTError
from sparsegpt.sparsity import parse_sparsity

if TYPE_CHECKING:
    from rich.table import Table

Shapes = Annotated[str, typer.Option(help="Layers as OUTxIN, comma-separated.")]
Tokens = Annotated[str, typer.Option(help="Tokens of one product, comma-separated.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds in which the candidates take turns.")]
Patterns = Annotated[str, typer.Option(help="Patterns, comma-separated.")]


def shapes_of(text: str) -> tuple[tuple[int, int], ...]:
    """Layers written as "OUTxIN,..."; raises SparseGPTError for others."""
    shapes = [shape.split("x") for shape in text.split(",")]
    if not all(len(shape) == 2 and all(_is_count(size) for size in shape) for shape in shapes):
        raise SparseGPTError(f"layers {text!r} are not understood: expected OUTxIN, as 2048x2048,4096x4096")
    return tuple((int(rows), int(columns)) for rows, columns in shapes)


def patterns_of(text: str) -> tuple[str, ...]:
    """Patterns, comma-separated; raises SparseGPTError for one that is none."""
    patterns = tuple(text.split(","))
    for pattern in patterns:
        parse_sparsity(pattern)
    return patterns


def check_figure(out: Path) -> None:
    """Raise SparseGPTError for what would be found after hours: no library that draws, no folder for the figure."""
    if find_spec("matplotlib") is None:
        raise SparseGPTError("matplotlib, which draws the figure, is not installed: pip install matplotlib")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SparseGPTError(f"figure {out} cannot be written: {error}; choose another", settings=("out",)) from error
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise SparseGPTError(f"figure {out} cannot be written: it is a folder, or lies in one that is not writable")


def counts_of(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1, comma-separated; raises SparseGPTError, with the option, for others."""
    counts = text.split(",")
    if not all(map(_is_count, counts)):
        raise SparseGPTError(f"{option} {text!r}: expected whole numbers from 1, comma-separated, as 1,16,64")
    return tuple(map(int, counts))


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and int(text) > 0


def print_failed(products: Sequence[dict[str, Any]]) -> None:
    """Products that were wrong or did not run, one a line."""
    for failed in products:
        case = "{rows} x {columns}, {tokens} tokens, {dtype}".format_map(failed)
        say(f"{failed['kernel']} failed at {case}: {failed['reason']}")


def print_rows(rows: Sequence[Any], *tables: "Table", as_json: bool) -> None:
    """Measurements for a program, one JSON object a line, or for a person."""
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        for table in tables:
            open_console().print(table)
