"""What is sparse in a model folder: every weight matrix checked against its pattern, from the files alone.

A weight that report.json lists must keep the pattern it was pruned to. Weights of folders without a report are
described by the patterns that they happen to satisfy.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import REPORT_NAME
from sparsegpt.files.headers import read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import CONFIG, read_config, weight_files
from sparsegpt.files.reported import ReportedLayer, reported_layers
from sparsegpt.files.tensor_files import OpenTensors
from sparsegpt.kernels.checkpoint.archive import verify_packed
from sparsegpt.kernels.checkpoint.matrices import Matrix, checkpoint_matrices, plain_matrices
from sparsegpt.kernels.checkpoint.packed_config import QUANT_METHOD, PackedConfig, read_packed_config
from sparsegpt.kernels.format.pack import first_violation
from sparsegpt.model.routers import expert_of
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity

# Tried on weights that no report speaks of, the strictest first.
COMMON_PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), NM(3, 4))
# A fraction counts as kept when the file has at least this share of the zeros asked for: rounding per block or row.
ROUNDING = 0.001


@dataclass(frozen=True)
class TensorFinding:
    """One weight matrix. pattern: promised by the report, or found; ok: whether it holds; problem: where it breaks.

    stored: how the file holds it: its dtype, or "packed" with the dtype or the integers of the kept values.
    An expert of a model that transformers does not know cannot be found in the files: `problem` says "not checked".
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    pattern: str
    ok: bool
    problem: str = ""
    stored: str = ""


def inspect_folder(folder: Path, *, trust_remote_code: bool = False) -> list[TensorFinding]:
    """Check every weight matrix in the safetensors files of a folder, one pruned layer in memory at a time.

    A layer whose weight the files keep in several tensors (experts' gate and up projections) is checked as a whole.
    Packed weights are checked in their dense form, after the checksums of their files. trust_remote_code: run code of
    the folder to learn what its model calls the tensors. Raises SparseGPTError when the folder has no such files, one
    is damaged, or a listed layer is missing.
    """
    files, packing = _files(folder), _packing(folder)
    if packing.modules:
        files = weight_files(folder)  # those that `_packing` has verified
    promised = reported_layers(folder) or {}
    with OpenTensors(files) as tensors:
        reader = _Reader(tensors, packing)
        matrices = _matrices(folder, reader.shapes(), promised, trust_remote_code=trust_remote_code)
        layers: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in matrices:
            layers[matrix.layer if matrix.layer in promised else matrix.name].append(matrix)
        lost = [name for name in promised if name not in layers]
        if any(expert_of(name) is None for name in lost):
            raise SparseGPTError(f"{folder / REPORT_NAME} lists {lost[0]}, but no file holds its weight")
        findings = [_examine(name, reader, parts, promised.get(name)) for name, parts in layers.items()]
    return findings + [_unchecked(promised[name]) for name in lost]


def _files(folder: Path) -> dict[str, Path]:
    """{tensor: file} of every safetensors file in a folder."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SparseGPTError(f"{folder} has no safetensors files: expected a model folder, as `run` writes it")
    return {name: path for path in paths for name in sorted(read_header(check_inside(folder, path)).entries)}


def _packing(folder: Path) -> PackedConfig:
    """How a packed folder keeps its weights, its checksums compared; nothing for an ordinary folder."""
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        return PackedConfig({})
    packing = read_packed_config(settings, folder)
    verify_packed(weight_files(folder), packing, folder)
    return packing


def _matrices(
    folder: Path, shapes: dict[str, Sequence[int]], promised: Iterable[str], *, trust_remote_code: bool
) -> list[Matrix]:
    """The matrices of an ordinary folder; of a model that transformers does not know, those that names alone tell."""
    try:
        return checkpoint_matrices(folder, shapes, promised, trust_remote_code=trust_remote_code)
    except SparseGPTError:
        return list(plain_matrices(folder, shapes))


@dataclass(frozen=True)
class _Reader:
    """Matrices of an ordinary folder, read from its own tensors or from packed ones."""

    tensors: OpenTensors
    packing: PackedConfig

    @cached_property
    def packed(self) -> dict[str, tuple[int, int]]:
        return self.packing.linears()

    def shapes(self) -> dict[str, Sequence[int]]:
        """Shapes of the tensors that the ordinary folder has, or had."""
        parts = {f"{linear}.{part}" for linear in self.packed for part in self.packing.form.parts}
        kept = {name: shape for name, shape in self.tensors.shapes().items() if name not in parts}
        return {**kept, **self.packing.ordinary_shapes()}

    def read(self, matrix: Matrix) -> tuple[Tensor, str]:
        """The dense weight [out, in] and the form in which it is stored."""
        if matrix.name not in self.packed:
            weight = matrix.read(self.tensors)
            return weight, str(weight.dtype).removeprefix("torch.")
        form = self.packing.form
        packed = self.packing.packed(self.tensors.__getitem__, matrix.name, self.packed[matrix.name])
        return form.unpack(packed), f"packed {form.stored(packed)}"


def _unchecked(layer: ReportedLayer) -> TensorFinding:
    """What the report says of an expert's weight that was not found: files may keep it under other names."""
    return TensorFinding(layer.name, layer.shape, layer.zeros, layer.sparsity, ok=True, problem="not checked")


def _examine(name: str, reader: _Reader, parts: list[Matrix], layer: ReportedLayer | None) -> TensorFinding:
    weights, forms = zip(*map(reader.read, parts), strict=True)
    finding = _check(name, torch.cat(weights), layer.sparsity if layer else None)
    return replace(finding, stored=forms[0])


def _check(name: str, weight: Tensor, promised: str | None) -> TensorFinding:
    rows, columns = weight.shape
    zeros = float((weight == 0).sum()) / max(1, weight.numel())
    if promised is None:
        return TensorFinding(name, (rows, columns), zeros, _found_pattern(weight, zeros), ok=True)
    pattern = parse_sparsity(promised)
    problem = ""
    if isinstance(pattern, NM):
        problem = first_bad_group(weight, pattern) or ""
    elif pattern.per_row and (bad := _first_full_row(weight, pattern)) is not None:
        problem = f"row {bad}: {float((weight[bad] == 0).float().mean()):.2%} zeros, {pattern} promises more"
    elif zeros < pattern.fraction - ROUNDING:
        problem = f"{zeros:.2%} zeros, fewer than the {pattern.fraction:.2%} promised"
    return TensorFinding(name, (rows, columns), zeros, promised, ok=not problem, problem=problem)


def _first_full_row(weight: Tensor, pattern: Unstructured) -> int | None:
    """The first row with fewer zeros than the pattern gives every row."""
    full = (weight == 0).sum(1) < round(pattern.fraction * weight.shape[1])
    return int(torch.nonzero(full)[0]) if full.any() else None


def _found_pattern(weight: Tensor, zeros: float) -> str:
    for pattern in COMMON_PATTERNS:
        if zeros and first_bad_group(weight, pattern) is None:
            return str(pattern)
    return "unstructured" if zeros > ROUNDING else "dense"


def first_bad_group(weight: Tensor, pattern: NM) -> str | None:
    """Where a weight [R, C] first has more than n non-zeros in a group of m, in words; None where it never does."""
    if weight.shape[1] % pattern.m:
        return f"{weight.shape[1]} columns do not divide into groups of {pattern.m}"
    violation = first_violation(weight, pattern)
    if violation is None:
        return None
    row, first = violation[0], violation[1] * pattern.m
    found = int((weight[row, first : first + pattern.m] != 0).sum())
    return f"row {row}, columns {first} to {first + pattern.m - 1}: {found} non-zeros, {pattern} allows {pattern.n}"
