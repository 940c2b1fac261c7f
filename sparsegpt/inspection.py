"""What is sparse in a model folder: every weight matrix checked against its pattern, from the files alone.

A weight that report.json lists must keep the pattern it was pruned to. Weights of folders without a report are
described by the patterns that they happen to satisfy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sparsegpt.checkpoint import REPORT_NAME
from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.archive import (
    QUANT_METHOD,
    IntegerValues,
    packed_module,
    read_packed_config,
    read_values,
    verify_files,
)
from sparsegpt.kernels.pack import unpack
from sparsegpt.kernels.tensor_files import read_json, weight_files
from sparsegpt.sparsity import NM, Unstructured, parse_sparsity
from sparsegpt.stages import expert_of

# Tried on weights that no report speaks of, the strictest first.
COMMON_PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), NM(3, 4))
# A fraction counts as kept when the file has at least this share of the zeros asked for: rounding per block or row.
ROUNDING = 0.001


@dataclass(frozen=True)
class TensorFinding:
    """One weight matrix. pattern: promised by the report, or found; ok: whether it holds; problem: where it breaks.

    stored: how the file holds it: its dtype, or "packed" with the dtype or the integers of the kept values.
    An expert's weight that the files keep in another form is not checked, and `problem` says so.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    pattern: str
    ok: bool
    problem: str = ""
    stored: str = ""


def inspect_folder(folder: Path) -> list[TensorFinding]:
    """Check every 2-D weight in the safetensors files of a folder, one tensor in memory at a time.

    Packed weights are checked in their dense form, after the checksums of their files. Raises SparseGPTError when the
    folder has no such files, one is damaged, or a listed layer is missing.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SparseGPTError(f"{folder} has no safetensors files: expected a model folder, as `run` writes it")
    packed, values = _packed_modules(folder)
    promised = _promised_layers(folder)
    turned = _model_type(folder) == "gpt2"
    findings = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name, weight, stored in _weights(tensors, packed, values):
                    layer = promised.pop(name, None)
                    # GPT-2's Conv1D keeps [in, out]; the head does not.
                    seen = weight.T if layer and turned and name != "lm_head" else weight
                    found = _examine(name, seen, layer["sparsity"] if layer else None)
                    findings.append(replace(found, stored=stored))
        except SafetensorError as error:
            raise SparseGPTError(f"{path} is truncated or damaged ({error}): write it again") from error
    lost = [name for name in promised if expert_of(name) is None]
    if lost:
        raise SparseGPTError(f"{folder / REPORT_NAME} lists {lost[0]}, but no file holds its weight")
    return findings + [_unchecked(layer) for layer in promised.values()]


def _packed_modules(folder: Path) -> tuple[dict[str, tuple[int, int]], IntegerValues | None]:
    """Dense shape of each packed module, none for an ordinary folder, and how values are stored; checksums first."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    packing = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(packing, dict) or packing.get("quant_method") != QUANT_METHOD:
        return {}, None
    verify_files(weight_files(folder))
    return read_packed_config(packing, folder), read_values(packing, folder)


def _weights(
    tensors: Any, packed: dict[str, tuple[int, int]], values: IntegerValues | None
) -> Iterator[tuple[str, Tensor, str]]:
    """Module name, dense weight and form of storage of every 2-D weight in an open file."""
    for key in sorted(tensors.keys()):
        module, _, kind = key.rpartition(".")
        if kind == "meta" and module in packed:
            form = packed_module(tensors.get_tensor, module, packed[module], values)
            yield module, unpack(form), f"packed {values or str(form.values.dtype).removeprefix('torch.')}"
        elif kind == "weight" and len(tensors.get_slice(key).get_shape()) == 2:
            weight = tensors.get_tensor(key)
            yield module, weight, str(weight.dtype).removeprefix("torch.")


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    return str(read_json(path).get("model_type")) if path.is_file() else ""


def _unchecked(layer: dict[str, Any]) -> TensorFinding:
    """What the report says of an expert's weight: the files keep it cut or joined, under other names."""
    return TensorFinding(
        layer["name"], layer["shape"], layer["zeros"], layer["sparsity"], ok=True, problem="not checked"
    )


def _promised_layers(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    try:
        report: dict[str, Any] = read_json(path)
        return {
            layer["name"]: {
                "name": layer["name"],
                "sparsity": layer["sparsity"],
                "shape": tuple(map(int, layer.get("shape", (0, 0)))),
                "zeros": float(layer.get("zeros", 0.0)),
            }
            for layer in report["layers"]
        }
    except (SparseGPTError, ValueError, KeyError, TypeError) as error:
        raise SparseGPTError(f"{path} is damaged ({error}): remove it to inspect the weights alone") from error


def _examine(name: str, weight: Tensor, promised: str | None) -> TensorFinding:
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
    count = rearrange(weight != 0, "r (g m) -> r g m", m=pattern.m).sum(-1)
    bad = torch.nonzero(count > pattern.n)
    if not len(bad):
        return None
    row, group = bad[0].tolist()
    first = group * pattern.m
    found = int(count[row, group])
    return f"row {row}, columns {first} to {first + pattern.m - 1}: {found} non-zeros, {pattern} allows {pattern.n}"
