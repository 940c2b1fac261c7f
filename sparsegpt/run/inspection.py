"""What is sparse in a model folder: every weight matrix checked against its pattern, from the files alone.

A weight that report.json lists must keep the pattern it was pruned to. Weights of folders without a report are
described by the patterns that they happen to satisfy.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import REPORT_NAME
from sparsegpt.files.reported import ReportedLayer, reported_layers
from sparsegpt.kernels.checkpoint.folder_weights import FolderWeights, open_weights
from sparsegpt.kernels.checkpoint.matrices import Matrix
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
    promised = reported_layers(folder) or {}
    with open_weights(folder) as weights:
        layers = weights.layers(promised, trust_remote_code=trust_remote_code)
        lost = [name for name in promised if name not in layers]
        if any(expert_of(name) is None for name in lost):
            raise SparseGPTError(f"{folder / REPORT_NAME} lists {lost[0]}, but no file holds its weight")
        findings = [_examine(name, weights, parts, promised.get(name)) for name, parts in layers.items()]
    return findings + [_unchecked(promised[name]) for name in lost]


def _unchecked(layer: ReportedLayer) -> TensorFinding:
    """What the report says of an expert's weight that was not found: files may keep it under other names."""
    return TensorFinding(layer.name, layer.shape, layer.zeros, layer.sparsity, ok=True, problem="not checked")


def _examine(name: str, weights: FolderWeights, parts: list[Matrix], layer: ReportedLayer | None) -> TensorFinding:
    dense, forms = zip(*map(weights.read, parts), strict=True)
    finding = _check(name, torch.cat(dense), layer.sparsity if layer else None)
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
