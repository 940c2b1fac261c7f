"""What the report of a folder says of its layers, read with suspicion."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.checked_json import REPORT_NAME, read_object
from sparsegpt.files.inside import check_inside
from sparsegpt.grid import Grid, parse_grid
from sparsegpt.sparsity import parse_sparsity


@dataclass(frozen=True)
class ReportedLayer:
    """A pruned layer: the sparsity that it was pruned to, its shape [out, in], its share of zeros, and its grid."""

    name: str
    sparsity: str
    shape: tuple[int, int]
    zeros: float
    grid: Grid | None = None


def reported_layers(folder: Path) -> dict[str, ReportedLayer] | None:
    """{module name: layer} of a folder's report.json, None without one.

    Raises SparseGPTError naming the file where it holds no such list.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    layers = read_object(check_inside(folder, path)).get("layers")
    try:
        if not isinstance(layers, list):
            raise SparseGPTError('expected a list of "layers"')
        found = [_layer(layer) for layer in layers]
    except SparseGPTError as error:
        raise SparseGPTError(
            f"{path} is damaged ({first_line(error)}): remove it to go by the weights alone"
        ) from error
    return {layer.name: layer for layer in found}


def _layer(row: Any) -> ReportedLayer:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"].isprintable():
        raise SparseGPTError('expected layers with a "name" and a "sparsity"')
    name, sparsity = row["name"], row.get("sparsity")
    if not isinstance(sparsity, str):
        raise SparseGPTError(f'{name}: expected a "sparsity" such as "2:4"')
    try:
        parse_sparsity(sparsity)
        grid = parse_grid(row.get("grid"))
    except SparseGPTError as error:
        raise SparseGPTError(f"{name}: {error}") from error
    shape, zeros = row.get("shape", [0, 0]), row.get("zeros", 0.0)
    if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
        raise SparseGPTError(f"{name}: expected a shape of two sizes")
    if isinstance(zeros, bool) or not isinstance(zeros, int | float) or not math.isfinite(zeros):
        raise SparseGPTError(f"{name}: expected a share of zeros")
    return ReportedLayer(name, sparsity, (shape[0], shape[1]), float(zeros), grid)
