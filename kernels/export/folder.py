"""A run's folder with integer weights, written as another program loads it.

The integers are those of the solver, found again from the weights that the run scored: `quantization.recover` gives
integers that decode to their very bits, or refuses. Linears on no grid, and everything else, stay as they are.

Dimension key: N out_features, K in_features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.files.beside import Beside
from sparsegpt.files.figures import tell_loading
from sparsegpt.files.model_files import CONFIG, read_config, weight_files
from sparsegpt.files.reported import reported_layers
from sparsegpt.files.results import new_result
from sparsegpt.files.tensor_files import DEFAULT_SHARD_BYTES, OpenTensors, ShardedWriter, header_room
from sparsegpt.grid import Grid
from sparsegpt.kernels.checkpoint.matrices import Matrix, checkpoint_matrices
from sparsegpt.kernels.export import compressed_tensors, gptq
from sparsegpt.model.loading import load_config, without_weights
from sparsegpt.quantization import Integers, recover


@dataclass(frozen=True)
class ExportFormat:
    """A format: why a weight does not fit it, the tensors [N, ...] of one that does, and what config.json says.

    one_grid: all linears must be on the same.
    """

    refusal: Callable[[Grid, tuple[int, int]], str | None]
    tensors: Callable[[Integers, torch.dtype], Iterator[tuple[str, Tensor]]]
    settings: Callable[[Mapping[str, Grid], Sequence[str]], dict[str, Any]]
    one_grid: bool = False


FORMATS = {
    compressed_tensors.NAME: ExportFormat(
        compressed_tensors.refusal, compressed_tensors.tensors, compressed_tensors.settings
    ),
    gptq.NAME: ExportFormat(gptq.refusal, gptq.tensors, gptq.settings, one_grid=True),
}


@dataclass(frozen=True)
class ExportReport:
    """What `export_folder` did: linears written, bytes of their weights before and after, files left behind."""

    linears: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int
    left_behind: tuple[str, ...] = ()


def export_folder(
    source: Path, target: Path, name: str, *, overwrite: bool = False, trust_remote_code: bool = False
) -> ExportReport:
    """Write the folder of a run, `source`, in the format `name` of FORMATS to the new folder `target`.

    trust_remote_code: run code of the folder to learn what its model calls the tensors.
    Raises SparseGPTError for a format that is not known, a folder whose report names no weights on a grid, weights that
    are not on it any more, and, naming the linear, weights that do not fit the format.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS, settings=("format",))
    source, target, form = Path(source), Path(target), FORMATS[name]
    config = read_config(source)
    if config.get("quantization_config"):
        raise SparseGPTError(f"{source}: already packed or quantised (config.json has quantization_config)")
    files, beside = weight_files(source), Beside.of(source, report=True)
    with OpenTensors(files) as tensors:
        matrices = _matrices(source, tensors, trust_remote_code=trust_remote_code)
        _check(matrices, tensors, form, name)
        with new_result(target, "export", overwrite=overwrite, sources=[source]) as stage:
            names = [*tensors, *(matrix.name for matrix, _ in matrices.values() for _ in range(4))]
            with ShardedWriter(stage, header_room(names), DEFAULT_SHARD_BYTES, checksums=False) as writer:
                exporter = _Exporter(form, matrices, tensors, writer)
                for tensor in tensors:
                    exporter.write(tensor)
            beside.copy_to(stage, but=frozenset({CONFIG}))
            tell_loading(stage, packed=False)
            ignored = _others(source, {matrix.name for matrix, _ in matrices.values()}, trust_remote_code)
            grids = {matrix.name: grid for matrix, grid in matrices.values()}
            whole = {**config, "quantization_config": form.settings(grids, ignored)}
            (stage / CONFIG).write_text(json.dumps(whole, indent=2) + "\n")
    left = tuple(map(str, beside.outside))
    return ExportReport(tuple(exporter.linears), exporter.dense_bytes, exporter.packed_bytes, left)


@dataclass
class _Exporter:
    """Writes linears of `matrices`, {tensor: (matrix, grid)}, in the format, others as they are, and counts."""

    form: ExportFormat
    matrices: Mapping[str, tuple[Matrix, Grid]]
    tensors: OpenTensors
    writer: ShardedWriter
    linears: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0

    def write(self, tensor: str) -> None:
        if tensor not in self.matrices:
            self.writer.add((tensor, self.tensors[tensor]))
            return
        matrix, grid = self.matrices[tensor]
        weight = matrix.read(self.tensors)
        parts = list(self.form.tensors(recover(weight, grid, matrix.name), weight.dtype))
        self.writer.add(*((f"{matrix.name}.{part}", values) for part, values in parts))
        self.linears.append(matrix.name)
        self.dense_bytes += weight.nbytes
        self.packed_bytes += sum(values.nbytes for _, values in parts)


def _matrices(source: Path, tensors: OpenTensors, *, trust_remote_code: bool) -> dict[str, tuple[Matrix, Grid]]:
    """{tensor: (its matrix, its grid)} of every linear that the report says is on one."""
    layers = reported_layers(source) or {}
    grids = {name: layer.grid for name, layer in layers.items() if layer.grid is not None}
    if not grids:
        raise SparseGPTError(
            f"{source}: no weights on a grid of integers (report.json names none): run with quantize first, as int4"
        )
    found = checkpoint_matrices(source, tensors.shapes(), layers, trust_remote_code=trust_remote_code)
    return {matrix.tensor: (matrix, grids[matrix.layer]) for matrix in found if matrix.layer in grids}


def _check(matrices: Mapping[str, tuple[Matrix, Grid]], tensors: OpenTensors, form: ExportFormat, name: str) -> None:
    shapes = tensors.shapes()
    for tensor, (matrix, grid) in matrices.items():
        if matrix.transposed or matrix.expert is not None:
            held = "the transposed weight of a Conv1D" if matrix.expert is None else "one of experts in one tensor"
            raise SparseGPTError(
                f"{matrix.name} is {held}, and {name} holds linears alone: keep the run's folder, or pack it"
            )
        if why := form.refusal(grid, (shapes[tensor][0], shapes[tensor][1])):
            raise SparseGPTError(f"{matrix.name} does not fit {name}: {why}", settings=("format",))
    found = sorted({str(grid) for _, grid in matrices.values()})
    if form.one_grid and len(found) > 1:
        raise SparseGPTError(
            f"{name} has one grid for all linears, found {', '.join(found)}: give {compressed_tensors.NAME}"
        )


def _others(source: Path, written: set[str], trust_remote_code: bool) -> list[str]:
    """Linears of the model that stay as they are."""
    config = load_config(str(source.absolute()), trust_remote_code=trust_remote_code)
    model = without_weights(config, as_saved=True, trust_remote_code=trust_remote_code)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in written]
