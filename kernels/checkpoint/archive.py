"""A pruned Hugging Face folder to its packed form and back, one tensor in memory at a time.

    <module>.weight [N, K]  <->  <module>.<part> for each part of the form, such as values and meta (layers/forms.py)

Rounding to integers is storage, to nearest; unpacking gives the rounded weights. Conv1D's transposed weights are packed
as [N, K]; of experts that are all in one tensor <path>.<part> each becomes a linear <path>.<expert>.<part>.

Packed are the weights of linear layers that keep the form's pattern; of experts a projection is packed when those of
all of them do. `report.json`, when it lies in the folder, says which layers were pruned; without it every candidate
that keeps the pattern is packed (a dense weight does not, by chance). `config.json` gets a `quantization_config` of our
own (packed_config.py), which transformers' quantizer interface reads (hf/). The target appears whole or not at all."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.beside import Beside
from sparsegpt.files.figures import retell, tell_loading
from sparsegpt.files.model_files import CONFIG, read_config, weight_files
from sparsegpt.files.reported import reported_layers
from sparsegpt.files.results import new_result
from sparsegpt.files.tensor_files import (
    DEFAULT_SHARD_BYTES,
    OpenTensors,
    ShardedWriter,
    header_room,
    verify_checksums,
)
from sparsegpt.kernels.checkpoint.matrices import Matrix, checkpoint_matrices
from sparsegpt.kernels.checkpoint.packed_config import PackedConfig, members, read_packed_config
from sparsegpt.kernels.format.form import Form, PackedWeight
from sparsegpt.kernels.layers.forms import usual_forms


@dataclass(frozen=True)
class PackReport:
    """What `pack_folder` did: in which form, linears packed, {tensor: why} left dense, bytes of the packed linears.

    left_behind: links that lead out of the folder, and whatever else is no regular file.
    """

    form: Form
    packed: tuple[str, ...]
    left_dense: Mapping[str, str]
    dense_bytes: int
    packed_bytes: int
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What is to be tried: in which form, {tensor: its matrices}, why not others, which layers are promised to work."""

    form: Form
    matrices: Mapping[str, list[Matrix]]
    left_dense: dict[str, str]
    promised: frozenset[str]


@dataclass
class _Packer:
    """Writes tensors of `plan` packed, others as they are, and counts what it has done."""

    plan: _Plan
    tensors: OpenTensors
    writer: ShardedWriter
    packed: list[Matrix] = field(default_factory=list)
    modules: dict[str, tuple[int, ...]] = field(default_factory=dict)  # as in config.json
    dense_bytes: int = 0
    packed_bytes: int = 0

    def write(self, tensor: str) -> None:
        matrices = self.plan.matrices.get(tensor, ())
        if not matrices or not all(self._pack(matrix) for matrix in matrices):
            self.writer.add((tensor, self.tensors[tensor]))

    def _pack(self, matrix: Matrix) -> bool:
        """Whether the matrix keeps the pattern and is packed now; a promised one that breaks it is an error."""
        weight, form = matrix.read(self.tensors), self.plan.form
        try:
            packed = form.pack(weight, f"{matrix.name}.weight")
        except SparseGPTError:
            if matrix.layer in self.plan.promised or form.keeps(weight):  # then something else is wrong with it
                raise
            self.plan.left_dense[matrix.tensor] = f"does not keep {form.demand}"
            return False
        parts = zip(form.parts, form.tensors(packed), strict=True)
        self.writer.add(*((f"{matrix.name}.{part}", tensor) for part, tensor in parts))
        self._count(matrix, weight, packed)
        return True

    def _count(self, matrix: Matrix, dense: Tensor, packed: PackedWeight) -> None:
        self.packed.append(matrix)
        experts = self.modules.get(matrix.group, (0,))[0] + 1
        self.modules[matrix.group] = packed.shape if matrix.bank is None else (experts, *packed.shape)
        self.dense_bytes += dense.nbytes
        self.packed_bytes += packed.nbytes

    def config(self) -> PackedConfig:
        transposed = frozenset(matrix.group for matrix in self.packed if matrix.transposed)
        stacked = frozenset(matrix.group for matrix in self.packed if matrix.expert is not None)
        return PackedConfig(self.modules, transposed, stacked, self.plan.form)


def pack_folder(
    source: Path,
    target: Path,
    *,
    form: Form | Sequence[Form] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> PackReport:
    """Write the packed form of the Hugging Face folder `source` to the new folder `target`.

    form: how the weights are stored, or several of which the one is taken that most weights keep, the first of those;
    by default 2:4 or a bitmask, with every bit kept. One that rounds changes the model by that.
    trust_remote_code: run code of the folder to learn what its model calls the tensors.

    Raises:
        SparseGPTError: no safetensors weights or config.json in `source`; already quantised or packed; a layer that
            report.json promises breaks the pattern (names tensor and first bad group); nothing to pack; experts of a
            model that transformers does not know; `target` exists and is not empty.
    """
    source, target = Path(source), Path(target)
    config = read_config(source)
    if config.get("quantization_config"):
        raise SparseGPTError(f"{source}: already packed or quantised (config.json has quantization_config)")
    files, beside = weight_files(source), Beside.of(source, report=True)
    with OpenTensors(files) as tensors:
        dtype, forms = _stored_dtype(tensors), [form] if isinstance(form, Form) else form or usual_forms()
        plan = _plan(source, tensors, [form.of_model(dtype) for form in forms], trust_remote_code=trust_remote_code)
        form = plan.form
        with new_result(target, "pack", overwrite=overwrite, sources=[source]) as stage:
            with ShardedWriter(stage, _room(tensors, plan), shard_bytes) as writer:
                packer = _Packer(plan, tensors, writer)
                for tensor in tensors:
                    packer.write(tensor)
                writer.add(*packer.config().placeholders())
            if not packer.packed:
                raise SparseGPTError(f"{source}: no linear layer keeps {form.demand}; prune the model to it first")
            _copy_beside(beside, stage)
            tell_loading(stage, packed=True)
            if form.rounding:
                retell(stage, form.rounding)
            _write_config(stage, {**config, "quantization_config": packer.config().to_dict()})
    names = tuple(matrix.name for matrix in packer.packed)
    left_behind = tuple(map(str, beside.outside))
    return PackReport(form, names, plan.left_dense, packer.dense_bytes, packer.packed_bytes, left_behind)


def unpack_folder(
    packed: Path, target: Path, *, shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
) -> tuple[str, ...]:
    """Write the ordinary dense-with-zeros form of a packed folder to `target`; returns the linears unpacked.

    Integer values come back as what they stand for, q * scale in the dtype of the model, not as what they were rounded
    from.

    Everything is checked before the first tensor is used (`verify_packed`). Raises SparseGPTError for a folder that is
    not packed, of a newer format, damaged or truncated, or when `target` exists and is not empty.
    """
    packed, target = Path(packed), Path(target)
    config = read_config(packed)
    packing = read_packed_config(config.pop("quantization_config", None), packed)
    files, beside = weight_files(packed), Beside.of(packed, report=True)
    verify_packed(files, packing, packed)
    linears = packing.linears()
    parts = {f"{linear}.{part}" for linear in linears for part in packing.form.parts}
    parts |= packing.ordinary_shapes().keys()  # placeholders
    with new_result(target, "unpack", overwrite=overwrite, sources=[packed]) as stage:
        with (
            ShardedWriter(stage, header_room(files), shard_bytes, checksums=False) as writer,
            OpenTensors(files) as tensors,
        ):
            for name in files:
                if name not in parts:
                    writer.add((name, tensors[name]))
            for named in packing.ordinary_weights(tensors.__getitem__):
                writer.add(named)
        _copy_beside(beside, stage)
        tell_loading(stage, packed=False)
        _write_config(stage, config)
    return tuple(linears)


def verify_files(files: Mapping[str, Path]) -> None:
    """Check the checksums of every file of {tensor name: file}, and that each file holds the tensors promised of it.

    Raises SparseGPTError naming the file and the tensor.
    """
    for path in dict.fromkeys(files.values()):
        found = verify_checksums(path)
        missing = sorted(name for name, file in files.items() if file == path and name not in found)
        if missing:
            raise SparseGPTError(f"{path}: the index promises {missing[0]}, which is not there; copy the folder again")


def verify_packed(files: Mapping[str, Path], packing: PackedConfig, where: object) -> None:
    """Check all that readers of a packed folder rely on, before anyone uses a tensor of {tensor name: file}.

    Checksums; that every packed linear has all its parts, once, and no ordinary weight beside them; and what the parts
    hold (`Form.check`). Raises SparseGPTError naming what is wrong.
    """
    verify_files(files)
    _check_parts(files, packing, where)
    with OpenTensors(files) as tensors:
        shapes = tensors.shapes()
        for name in packing.ordinary_shapes():
            if shapes.get(name, [1]) != [1]:
                raise SparseGPTError(f"{where}: {name} is there packed and as it was: one must go; pack again")
        for linear, shape in packing.linears().items():
            try:
                packing.packed(tensors.__getitem__, linear, shape, check=True)
            except SparseGPTError as error:
                raise SparseGPTError(f"{where}: {error}; pack the model again") from error


def _check_parts(names: Container[str], packing: PackedConfig, where: object) -> None:
    """That each linear comes once, and with all its tensors: with more experts than tensors the first one ends it."""
    seen: set[str] = set()
    for group, shape in packing.modules.items():
        for linear in members(group, shape):
            if linear in seen:
                raise SparseGPTError(f"{where}: config.json names {linear} twice; pack again")
            seen.add(linear)
            for name in (f"{linear}.{part}" for part in packing.form.parts):
                if name not in names:
                    raise SparseGPTError(
                        f"{where}: config.json promises {name}, which is not in the weights; pack again"
                    )


def _plan(source: Path, tensors: OpenTensors, forms: Sequence[Form], *, trust_remote_code: bool) -> _Plan:
    """Which matrices to pack, and how: those that report.json lists, of experts a projection of all or of none."""
    listed = {name: layer.sparsity for name, layer in layers.items()} if (layers := reported_layers(source)) else None
    shapes = tensors.shapes()  # a truncated file is refused here, before anything is written
    found = checkpoint_matrices(source, shapes, listed or (), trust_remote_code=trust_remote_code)
    form = _fitting(forms, listed, found, tensors)
    promised = frozenset(layer for layer, sparsity in (listed or {}).items() if form.promised(sparsity))
    _check_promised(source, promised, found)
    left_dense = {name: _why_no_matrix(name) for name, shape in shapes.items() if len(shape) in (2, 3)}
    plan: dict[str, list[Matrix]] = defaultdict(list)
    for group in _groups(found):
        reason = _why_dense(group, listed, promised, tensors, form)
        for matrix in group:
            if reason is None:
                plan[matrix.tensor].append(matrix)
                left_dense.pop(matrix.tensor, None)
            else:
                left_dense[matrix.tensor] = reason
    return _Plan(form, plan, left_dense, promised)


def _fitting(
    forms: Sequence[Form], listed: Mapping[str, str] | None, found: Iterable[Matrix], tensors: OpenTensors
) -> Form:
    """The form that takes most of the layers that report.json lists, or else of the weights; the first of those."""
    if len(forms) == 1:
        return forms[0]
    if listed is not None:
        return max(forms, key=lambda form: sum(map(form.promised, listed.values())))
    counts = [0] * len(forms)
    for matrix in found:
        weight = matrix.read(tensors) if matrix.linear else None
        counts = [
            count + (weight is not None and form.keeps(weight)) for count, form in zip(counts, forms, strict=True)
        ]
    return forms[counts.index(max(counts))]


def _groups(matrices: Iterable[Matrix]) -> Iterable[list[Matrix]]:
    """What is packed together or not at all: one linear, or a projection of all experts."""
    groups: dict[object, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.bank or matrix.name].append(matrix)
    return groups.values()


def _why_dense(
    group: list[Matrix], listed: Mapping[str, str] | None, promised: Container[str], tensors: OpenTensors, form: Form
) -> str | None:
    """Why the matrices of a group are not even tried, or None."""
    if not group[0].linear:
        return _why_no_matrix(group[0].tensor)
    if listed is not None and not all(matrix.layer in listed for matrix in group):
        return "not pruned" if group[0].bank is None else "not all experts of the layer were pruned"
    if group[0].bank is None or all(matrix.layer in promised for matrix in group):
        return None
    if all(form.keeps(matrix.read(tensors)) for matrix in group):
        return None
    return f"not every expert keeps {form.demand}"


def _why_no_matrix(tensor: str) -> str:
    if "experts." in tensor and not tensor.endswith("_bias"):
        return "experts in a form that is not known: no linear of the loaded model has this weight"
    return "not the weight of a linear layer"


def _room(tensors: OpenTensors, plan: _Plan) -> int:
    """Header space for every tensor that may come: room for three parts at least, whatever the form, a placeholder."""
    matrices = [matrix for group in plan.matrices.values() for matrix in group]
    parts = range(1 + max(3, len(plan.form.parts)))
    return header_room([*tensors, *(matrix.name for matrix in matrices for _ in parts)])


def _stored_dtype(tensors: OpenTensors) -> torch.dtype:
    """The dtype of the model's matrices; the first one decides."""
    for name, shape in tensors.shapes().items():
        if len(shape) == 2 and (dtype := tensors.dtype(name)).is_floating_point:
            return dtype
    return torch.bfloat16


def _check_promised(source: Path, promised: Iterable[str], found: list[Matrix]) -> None:
    there = {matrix.layer for matrix in found}
    for layer in promised:
        if layer not in there:
            form = f"no {layer}.weight, nor experts that can be packed as this; remove report.json to pack the rest"
            raise SparseGPTError(f"{source}: report.json lists {layer}, but the weights hold {form}")


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _copy_beside(beside: Beside, stage: Path) -> None:
    """Tokenizer, report, generation settings, remote code: every file that is no weight and not config.json."""
    beside.copy_to(stage, but=frozenset({CONFIG}))
