"""The model card of a pruned model: a section of README.md, and the entries of its front matter that the Hub reads.

The source's card stays as it is, to the letter. Front matter that is no YAML is left alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sparsegpt.files.figures import BEGIN, END, LOADING, without_figures

# ---, lines of YAML, ---, as the Hub finds them.
_FRONT_MATTER = re.compile(r"\A(\s*---(?:\r\n|\n))(.*?)((?:\r\n|\n)---[ \t]*(?:\r\n|\n|\Z))", re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?", re.ASCII)
_TAGS = ("sparsegpt", "pruned")


@dataclass(frozen=True)
class Card:
    """What the section says.

    base: the Hub id, or the name of the folder. patterns: of the run and its recipe. rows: what else stands in the
    table. perplexities: {text: {model: perplexity}}. loader: the class of transformers that loads the model. made: how
    it came about, in a sentence.
    """

    base: str
    patterns: tuple[str, ...]
    method: str
    rows: Mapping[str, str]
    perplexities: Mapping[str, Mapping[str, float]]
    command: str | None
    loader: str
    trust_remote_code: bool = False
    made: str = "Made by one-shot pruning: nothing but the weights differs from the base model."

    def added_to(self, readme: bytes | None) -> bytes:
        """The source's README.md, or a fresh one, with the section at its end."""
        text = (readme or f"# {self.base}, pruned\n".encode()).decode("utf-8", "surrogateescape")
        text = without_figures(text, "pruned once more, see below")
        newline = "\r\n" if "\r\n" in text else "\n"
        section = self.section().replace("\n", newline)
        whole = self._with_metadata(text, newline).rstrip() + 2 * newline + section
        return whole.encode("utf-8", "surrogateescape")

    def section(self) -> str:
        """Markdown."""
        rows = {"base model": self.base, "pattern": ", ".join(self.patterns), "method": self.method, **self.rows}
        parts = [
            "## Pruned with sparsegpt",
            self.made,
            _table(("", ""), list(rows.items())),
            self._figures(),
            *(("The command:", _fenced("sh", self.command)) if self.command else ()),
            "To load it, with the name of this repository or its folder:",
            f"{LOADING}\n{_fenced('python', self._loading())}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _figures(self) -> str:
        if not self.perplexities:
            return ""
        models = list(dict.fromkeys(model for row in self.perplexities.values() for model in row))
        rows = [
            (text, *(f"{row[model]:.4f}" if model in row else "" for model in models))
            for text, row in self.perplexities.items()
        ]
        return f"{BEGIN}\n\n{_table(('perplexity', *models), rows)}\n\n{END}"

    def _loading(self) -> str:
        trust = ", trust_remote_code=True" if self.trust_remote_code else ""
        words = "AutoTokenizer" if self.loader == "AutoModelForCausalLM" else "AutoProcessor"
        return (
            f"from transformers import {self.loader}, {words}\n\n"
            f'model = {self.loader}.from_pretrained(name, dtype="auto"{trust})\n'
            f"{words.removeprefix('Auto').lower()} = {words}.from_pretrained(name{trust})"
        )

    def _with_metadata(self, text: str, newline: str) -> str:
        """The text with front matter that names the base model and the tags."""
        found = _FRONT_MATTER.match(text)
        if found is None and text.lstrip("\ufeff \t\r\n").startswith("---"):
            return text  # it begins and does not end
        before = found[2] if found else ""
        try:
            known = (yaml.safe_load(before) if before.strip() else None) or {}
        except (yaml.YAMLError, ValueError, RecursionError):
            return text
        if not isinstance(known, dict):
            return text
        wanted = self._metadata(known)
        after = _edited(before, known, wanted, newline)
        if after is None:
            return text
        if found:
            return found[1] + after + found[3] + text[found.end() :]
        return f"---{newline}{after}{newline}---{newline}{newline}{text}"

    def _metadata(self, known: dict[Any, Any]) -> dict[Any, Any]:
        """What is known already, with what lacks."""
        tags = known.get("tags") or []
        tags = tags if isinstance(tags, list) else [tags]
        new = [tag for tag in (*_TAGS, *self.patterns) if tag not in tags]
        defaults = {"library_name": "transformers"}
        if _HUB_ID.fullmatch(self.base):
            defaults = {"base_model": self.base, **defaults}
        lacking = {key: value for key, value in defaults.items() if not known.get(key)}
        return {**known, **lacking, "tags": [*tags, *new]}


def _edited(text: str, known: dict[Any, Any], wanted: dict[Any, Any], newline: str) -> str | None:
    """Lines of YAML with the entries of `wanted` that differ put in place; None where that goes wrong.

    Everything else stays to the letter: comments, order, and values that YAML would write otherwise.
    """
    lines = re.split(r"\r?\n", text) if text else []
    for key in (key for key in wanted if key not in known or wanted[key] != known[key]):
        new = yaml.safe_dump({key: wanted[key]}, sort_keys=False, allow_unicode=True).splitlines()
        lines = _replaced(lines, key, new)
    edited = newline.join(lines)
    try:
        return edited if yaml.safe_load(edited) == wanted else None
    except (yaml.YAMLError, ValueError):
        return None


def _replaced(lines: list[str], key: str, new: list[str]) -> list[str]:
    """The lines with those of a top-level key exchanged, or with new ones at their end."""
    start = next((number for number, line in enumerate(lines) if re.match(rf"['\"]?{key}['\"]?\s*:", line)), None)
    if start is None:
        return [*lines, *new]
    end = start + 1
    while end < len(lines) and re.match(r"[\s#\]\-]|\Z", lines[end]):  # the items of a list need not be indented
        end += 1
    while end > start + 1 and re.match(r"\s*(#|\Z)", lines[end - 1]):  # remarks on what comes next
        end -= 1
    return [*lines[:start], *new, *lines[end:]]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(language: str, text: str) -> str:
    """A block of code, in a fence longer than any that the text holds."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
