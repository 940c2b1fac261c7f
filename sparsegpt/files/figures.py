"""What report.json and the model card say of the weights beside them, and what becomes of it when those change.

In the card, comments that no reader sees mark where figures begin and end.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import REPORT_NAME, read_checked, read_json, write_checked, write_json

CARD_NAME = "README.md"
BEGIN, END = "<!-- sparsegpt: figures -->", "<!-- sparsegpt: end of figures -->"
# Entries of the report that tell how good the very weights are that were pruned, or which run they are the result of.
MEASURED = ("perplexity", "bits_per_byte", "tokens_per_second", "tasks")
BEFORE = "before_change"
# The code in the card that loads the model begins after this; for packed weights with one more line.
LOADING = "<!-- sparsegpt: loading -->"
_LOADING = re.compile(re.escape(LOADING).encode() + rb"\s+```python\r?\n")
_PACKED = b"import sparsegpt  # from here on transformers reads packed folders\n"


def retell(folder: Path, change: str) -> None:
    """Say in a folder's report and card that its weights were changed afterwards, and whose figures those are.

    change: how, as the end of "the weights were changed: ...". Where there is no report, or none that can be read, or
    no card of ours, nothing is said.
    """
    report, card = folder / REPORT_NAME, folder / CARD_NAME
    if report.is_file():
        _retell_report(report, change)
    if card.is_file():
        text = card.read_bytes().decode("utf-8", "surrogateescape")
        card.write_bytes(without_figures(text, change).encode("utf-8", "surrogateescape"))


def tell_loading(folder: Path, *, packed: bool) -> None:
    """Say in a folder's card, if it has one of ours, how the folder is loaded."""
    card = folder / CARD_NAME
    if card.is_file():
        text = card.read_bytes().replace(_PACKED, b"")
        card.write_bytes(_LOADING.sub(lambda found: found[0] + _PACKED, text) if packed else text)


def of_other_weights(report: dict[str, Any], change: str) -> dict[str, Any]:
    """A report of a folder whose weights were changed: no score is that folder's own any more.

    What was measured before stands under an entry of its own that says so; so do the errors of single layers.
    """
    measured = {name: report[name] for name in MEASURED if report.get(name)}
    before = {"change": change, "measured_before": [*measured, "layers.relative_error", "blocks.relative_error"]}
    kept = {name: value for name, value in report.items() if name != "identity"}  # it is no result of that run
    return {**kept, **{name: {} for name in MEASURED if name in report}, BEFORE: {**before, **measured}}


def without_figures(card: str, change: str) -> str:
    """A card with a sentence in the place of its figures."""
    sentence = f"The weights were changed afterwards: {change}. Score them with `sparsegpt eval`."
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda found: sentence, card, flags=re.DOTALL)


def _retell_report(path: Path, change: str) -> None:
    """Write it anew, with a checksum if it had one that held."""
    with suppress(SparseGPTError):
        write_checked(path, of_other_weights(read_checked(path), change))
        return
    content = read_json(path)
    if isinstance(content, dict):
        write_json(path, of_other_weights(content, change))
