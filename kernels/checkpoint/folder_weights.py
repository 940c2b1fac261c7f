"""Every weight matrix of a model folder, ordinary or packed, in its dense form, one in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.headers import read_header
from sparsegpt.files.inside import check_inside
from sparsegpt.files.model_files import CONFIG, read_config, weight_files
from sparsegpt.files.tensor_files import OpenTensors
from sparsegpt.kernels.checkpoint.archive import verify_packed
from sparsegpt.kernels.checkpoint.matrices import Matrix, checkpoint_matrices, plain_matrices
from sparsegpt.kernels.checkpoint.packed_config import QUANT_METHOD, PackedConfig, read_packed_config


@dataclass(frozen=True)
class FolderWeights:
    """The matrices of a folder, read from tensors of its own or from packed ones."""

    folder: Path
    tensors: OpenTensors
    packing: PackedConfig

    @cached_property
    def packed(self) -> dict[str, tuple[int, int]]:
        """Dense shapes of the packed linears."""
        return self.packing.linears()

    def shapes(self) -> dict[str, Sequence[int]]:
        """Shapes of the tensors that the ordinary folder has, or had."""
        parts = {f"{linear}.{part}" for linear in self.packed for part in self.packing.form.parts}
        kept = {name: shape for name, shape in self.tensors.shapes().items() if name not in parts}
        return {**kept, **self.packing.ordinary_shapes()}

    def matrices(self, layers: Iterable[str] = (), *, trust_remote_code: bool = False) -> list[Matrix]:
        """All of an ordinary folder; of a model that transformers does not know, those that names alone tell.

        layers: names that report.json uses. trust_remote_code: run code of the folder to learn what its model calls
        the tensors.
        """
        shapes = self.shapes()
        try:
            return checkpoint_matrices(self.folder, shapes, layers, trust_remote_code=trust_remote_code)
        except SparseGPTError:
            return list(plain_matrices(self.folder, shapes))

    def layers(self, layers: Collection[str] = (), **options: bool) -> dict[str, list[Matrix]]:
        """Matrices by the layers they are of, or parts of; those of no such layer by their own names."""
        found: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in self.matrices(layers, **options):
            found[matrix.layer if matrix.layer in layers else matrix.name].append(matrix)
        return found

    def read(self, matrix: Matrix) -> tuple[Tensor, str]:
        """The dense weight [N, K], and how it is stored: its dtype, or "packed" with that of the kept values."""
        if matrix.name not in self.packed:
            weight = matrix.read(self.tensors)
            return weight, str(weight.dtype).removeprefix("torch.")
        form = self.packing.form
        packed = self.packing.packed(self.tensors.__getitem__, matrix.name, self.packed[matrix.name])
        return form.unpack(packed), f"packed {form.stored(packed)}"


@contextmanager
def open_weights(folder: Path) -> Iterator[FolderWeights]:
    """The weights of a folder, for as long as its files are open; packed ones are compared with their checksums.

    Raises SparseGPTError for a folder without safetensors files, and for damaged ones.
    """
    files, packing = _files(folder), _packing(folder)
    if packing.modules:
        files = weight_files(folder)  # those that `_packing` has verified
    with OpenTensors(files) as tensors:
        yield FolderWeights(folder, tensors, packing)


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
