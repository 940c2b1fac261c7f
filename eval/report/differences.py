"""How far models differ: in the places of their zeros, layer by layer, from the weights; and in what reports say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.report.reading import Run, read_run
from sparsegpt.eval.report.several import settings_of
from sparsegpt.files.checked_json import REPORT_NAME
from sparsegpt.kernels.checkpoint.folder_weights import FolderWeights, open_weights


@dataclass(frozen=True)
class LayerDifference:
    """A weight matrix of two models.

    mask: the share of places where one of them has a zero and the other has none. zeros: the share of each.
    equal: whether all values are the same. Of matrices of different shapes the rest is None.
    """

    name: str
    shapes: tuple[tuple[int, int], tuple[int, int]]
    mask: float | None = None
    zeros: tuple[float, float] | None = None
    equal: bool = False


@dataclass(frozen=True)
class Difference:
    """Two models: the matrices that both have, and those that only one has."""

    first: str
    second: str
    layers: tuple[LayerDifference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]

    @property
    def changed(self) -> list[LayerDifference]:
        """Where zeros differ, the most first."""
        return sorted((layer for layer in self.layers if layer.mask), key=lambda layer: -(layer.mask or 0.0))


@dataclass(frozen=True)
class Model:
    """A model as a comparison sees it; run: what its report says, None where there is none that can be read."""

    name: str
    folder: Path
    file_bytes: int
    run: Run | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        run, report = self.run, self.run.report if self.run else None
        kept = ("sparsity", "method", "perplexity", "bits_per_byte", "tasks", "seconds")
        return {
            "name": self.name,
            "folder": str(self.folder),
            "file_bytes": self.file_bytes,
            "packed_bytes": run.packed_bytes if run else None,
            "zeros": run.zeros if run else None,
            **{key: report.get(key) if report else None for key in kept},
        }


@dataclass(frozen=True)
class Comparison:
    """Models side by side, each after the first compared with it; notes: lines on what could not be read."""

    models: tuple[Model, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, list[str]]:
        """{setting: its text in each model that has a report} where they differ."""
        return settings_of([model.run for model in self.models if model.run])[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "models": [model.as_dict() for model in self.models],
            "settings": self.settings,
            "differences": [asdict(found) for found in self.differences],
            "notes": self.notes,
        }


def compare_folders(folders: Mapping[str, Path], *, masks: bool = True, trust_remote_code: bool = False) -> Comparison:
    """Compare model folders {name: folder}, packed or not. masks: read the weights, each after the first with it.

    trust_remote_code: run code of a folder to learn what its model calls the tensors. Raises SparseGPTError for folders
    that cannot be read, and where the first has no weight matrix in common with another.
    """
    notes: list[str] = []
    models = tuple(_model(name, folder, notes) for name, folder in folders.items())
    pairs = [(models[0], other) for other in models[1:]] if masks else []
    found = tuple(_difference(*pair, trust_remote_code=trust_remote_code) for pair in pairs)
    return Comparison(models, found, tuple(notes))


def _model(name: str, folder: Path, notes: list[str]) -> Model:
    run = None
    try:
        if (folder / REPORT_NAME).is_file():
            run = read_run(folder, name)
    except SparseGPTError as error:
        notes.append(f"{error}; {name} is compared without it")
    return Model(name, folder, sum(path.stat().st_size for path in folder.glob("*.safetensors")), run)


def _difference(first: Model, second: Model, *, trust_remote_code: bool) -> Difference:
    with open_weights(first.folder) as one, open_weights(second.folder) as other:
        here, there = (weights.layers(trust_remote_code=trust_remote_code) for weights in (one, other))
        both = [name for name in here if name in there]
        if not both:
            raise SparseGPTError(
                f"{first.name} and {second.name} have no weight in common: expected models of one kind"
            )
        layers = tuple(_compared(name, _whole(one, here[name]), _whole(other, there[name])) for name in both)
    lone = [tuple(name for name in names if name not in rest) for names, rest in itertools.permutations((here, there))]
    return Difference(first.name, second.name, layers, *lone)


def _whole(weights: FolderWeights, matrices: Any) -> Tensor:
    return torch.cat([weights.read(matrix)[0] for matrix in matrices])


def _compared(name: str, one: Tensor, other: Tensor) -> LayerDifference:
    shapes = _shape(one), _shape(other)
    if shapes[0] != shapes[1]:
        return LayerDifference(name, shapes)
    here, there = one == 0, other == 0
    count = max(1, one.numel())
    zeros = float(here.sum()) / count, float(there.sum()) / count
    return LayerDifference(name, shapes, float((here != there).sum()) / count, zeros, torch.equal(one, other))


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
