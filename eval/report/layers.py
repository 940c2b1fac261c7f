"""A run's linears for a reader: block by block and kind by kind, and which of them fared worst."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from sparsegpt.eval.report.reading import Layer, Run, number, size_of
from sparsegpt.eval.report.texts import bits, error, percent

WORST = 5
# Rows of the table of layers: of models with thousands of experts the worst.
ROWS = 700
# Up to so many blocks the cells of a heat map have room for numbers.
ROOMY = 12
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# By what is worst when it is largest.
ERROR = "relative_error"


class Place(NamedTuple):
    """Where a linear stands: the number of its block, None outside of them, and its name in there without numbers."""

    block: int | None
    kind: str


def place_of(name: str) -> Place:
    """`model.layers.3.mlp.experts.7.up_proj` is in block 3, one of the kind `mlp.experts.*.up_proj`."""
    found = _NUMBER.search(name)
    if found is None:
        return Place(None, name)
    return Place(int(found[0]), _NUMBER.sub("*", name[found.end() + 1 :]) or name)


@dataclass(frozen=True)
class Cell:
    """Of one kind in one block: the mean of a number over its linears, as a text too, and its place on the scale."""

    value: float
    text: str
    share: float
    linears: int


@dataclass(frozen=True)
class HeatMap:
    """A number of every linear, by kind (rows) and block (columns). None: nothing was pruned there."""

    title: str
    says: str
    blocks: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    lowest: str
    largest: str

    @property
    def roomy(self) -> bool:
        """Whether cells have room for numbers."""
        return len(self.blocks) <= ROOMY


class Measure(NamedTuple):
    """An entry of a layer's row that is worth a heat map. from_zero: where its scale begins; else at the smallest."""

    key: str
    title: str
    says: str
    text: Callable[[float], str]
    from_zero: bool = False


MEASURES = (
    Measure(ERROR, "Error", "Share of a layer's output that changed; more colour is worse.", error, from_zero=True),
    Measure("zeros", "Zeros", "Share of a layer's weights that are zero.", percent),
    Measure("bits", "Bits", "Bits that a weight takes, packed or dense, whichever is smaller.", bits),
)


@dataclass(frozen=True)
class Layers:
    """The linears of a run."""

    run: Run

    @cached_property
    def maps(self) -> list[HeatMap]:
        """A heat map of each measure that differs from layer to layer."""
        return [found for measure in MEASURES if (found := self._map(measure)) is not None]

    @cached_property
    def uniform(self) -> list[str]:
        """A sentence for each measure that is the same everywhere."""
        found = {measure.title: self._texts(measure) for measure in MEASURES}
        return [f"{title}: {texts.pop()} in every pruned layer." for title, texts in found.items() if len(texts) == 1]

    @cached_property
    def worst_first(self) -> list[Layer]:
        """By relative error; what has none comes last."""
        return sorted(self.run.layers, key=lambda layer: -(number(layer, ERROR) or 0.0))

    @property
    def worst(self) -> list[Layer]:
        """The few whose output changed most."""
        return [layer for layer in self.worst_first[:WORST] if number(layer, ERROR) is not None]

    @property
    def table(self) -> list[Layer]:
        """As many as a page has room for: all in the model's order, or the worst."""
        return self.run.layers if len(self.run.layers) <= ROWS else self.worst_first[:ROWS]

    @cached_property
    def by_kind(self) -> list[tuple[str, float]]:
        """Mean error of each kind of linear, weighed by size, the largest first."""
        sums: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for layer in self.run.layers:
            if (value := number(layer, ERROR)) is not None:
                sums[place_of(layer["name"]).kind].append((value, size_of(layer)))
        means = {kind: _mean(pairs) for kind, pairs in sums.items()}
        return sorted(means.items(), key=lambda pair: -pair[1])

    @property
    def patterns(self) -> list[str]:
        """The patterns in use."""
        return list(dict.fromkeys(layer["sparsity"] for layer in self.run.layers))

    def _texts(self, measure: Measure) -> set[str]:
        values = (number(layer, measure.key) for layer in self.run.layers)
        return {measure.text(value) for value in values if value is not None}

    def _map(self, measure: Measure) -> HeatMap | None:
        if len(self._texts(measure)) < 2:
            return None
        cells: dict[Place, list[float]] = defaultdict(list)
        for layer in self.run.layers:
            if (value := number(layer, measure.key)) is not None:
                cells[place_of(layer["name"])].append(value)
        blocks = sorted({place.block for place in cells if place.block is not None})
        kinds = list(dict.fromkeys(place.kind for place in cells if place.block is not None))
        means = {place: sum(values) / len(values) for place, values in cells.items()}
        if not blocks:
            return None
        shown = [mean for place, mean in means.items() if place.block is not None]
        low, high = 0.0 if measure.from_zero else min(shown), max(shown)

        def cell(place: Place) -> Cell | None:
            if place not in means:
                return None
            # errors are squares: by their roots the differences between good layers can be seen too
            share = (max(0.0, means[place] - low) / (high - low)) ** 0.5 if high > low else 0.0
            return Cell(means[place], measure.text(means[place]), share, len(cells[place]))

        rows = tuple((kind, tuple(cell(Place(block, kind)) for block in blocks)) for kind in kinds)
        return HeatMap(measure.title, measure.says, tuple(blocks), rows, measure.text(low), measure.text(high))


def _mean(pairs: list[tuple[float, int]]) -> float:
    weights = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weights if weights else 0.0
