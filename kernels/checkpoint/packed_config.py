"""What config.json says of a packed folder: the `quantization_config` of our own.

    modules     {name: [N, K]}, the dense shape of each packed linear; a name with a * is that of all experts of a layer
                at once, with shape [E, N, K]: its linears are the names with 0 to E - 1 in place of the *
    transposed  names whose weights an ordinary folder keeps as [K, N] (Conv1D, some experts)
    stacked     names with a * whose weights an ordinary folder keeps in one tensor, called without the `*.`; all other
                weights are called <linear>.weight there
    pattern, and what else the form of the weights says of itself (`Form.settings`)

Under the name of each ordinary weight the files hold a placeholder, one byte: a loader that does not know this format
finds a tensor of another shape there and stops, where it would else make up random weights.
Dimension key: N out_features, K in_features, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.format.pack import FloatValues
from sparsegpt.kernels.layers.forms import read_form

QUANT_METHOD = "sparsegpt"
FORMAT_VERSION = 2
# Version 1 had no placeholders: a loader that does not know the format took random weights for the packed ones.
READABLE_VERSIONS = (1, FORMAT_VERSION)
_LARGEST = 1 << 50  # of a size


@dataclass(frozen=True)
class PackedConfig:
    """A `quantization_config`: fields as in the head of the file."""

    modules: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()
    form: Form = field(default_factory=FloatValues)

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it; what is empty is left out."""
        settings: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "pattern": self.form.pattern,
            "modules": {name: list(shape) for name, shape in self.modules.items()},
        }
        if self.transposed:
            settings["transposed"] = sorted(self.transposed)
        if self.stacked:
            settings["stacked"] = sorted(self.stacked)
        return {**settings, **self.form.settings()}

    def linears(self) -> dict[str, tuple[int, int]]:
        """{linear: dense shape (N, K)}, expert by expert."""
        return {
            linear: (shape[-2], shape[-1]) for name, shape in self.modules.items() for linear in members(name, shape)
        }

    def ordinary_shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor: shape} of the packed weights in an ordinary folder."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (*experts, rows, columns) in self.modules.items():
            matrix = (columns, rows) if name in self.transposed else (rows, columns)
            if name in self.stacked:
                found[stack_name(name)] = (*experts, *matrix)
            else:
                found |= {f"{linear}.weight": matrix for linear in members(name, self.modules[name])}
        return found

    def placeholders(self) -> Iterator[tuple[str, Tensor]]:
        """-> (name, [1] uint8) of what stands where an ordinary folder has the packed weights [N, K]."""
        return ((name, torch.zeros(1, dtype=torch.uint8)) for name in self.ordinary_shapes())

    def ordinary_weights(self, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, weight [N, K], [K, N] or [E, ...]) of every packed tensor as an ordinary folder keeps it.

        tensor: look-up of a packed part by its name. Raises SparseGPTError for parts that do not fit.
        """
        for name, shape in self.modules.items():
            weights = (
                (linear, self._ordinary(name, self.form.unpack(self.packed(tensor, linear, shape[-2:]))))
                for linear in members(name, shape)
            )
            if name in self.stacked:
                yield stack_name(name), _stack((weight for _, weight in weights), shape[0])
            else:
                yield from ((f"{linear}.weight", weight.contiguous()) for linear, weight in weights)

    def _ordinary(self, name: str, weight: Tensor) -> Tensor:
        return weight.T if name in self.transposed else weight

    def packed(
        self, tensor: Callable[[str], Tensor], linear: str, shape: tuple[int, ...], *, check: bool = False
    ) -> Any:
        """A linear's packed weight [N, K], from a look-up of its parts; check: their content too (`Form.check`).

        Raises SparseGPTError, with the linear's name, where these do not fit.
        """
        tensors = [tensor(f"{linear}.{part}") for part in self.form.parts]
        try:
            packed = self.form.packed(tensors, (shape[0], shape[1]))
            if check:
                self.form.check(packed)
            return packed
        except SparseGPTError as error:
            raise SparseGPTError(f"{linear}: {error}") from error


def _stack(matrices: Iterator[Tensor], count: int) -> Tensor:
    """[N, K] so many times -> [E, N, K], as `torch.stack`, with one matrix beside the result."""
    first = next(matrices)
    whole = first.new_empty(count, *first.shape)
    whole[0] = first
    for index, matrix in enumerate(matrices, 1):
        whole[index] = matrix
    return whole


def stack_name(name: str) -> str:
    """The ordinary folder's tensor of a stacked name."""
    return name.replace("*.", "")


def members(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """The linears that a name of `modules` stands for."""
    if "*" not in name:
        yield name
    else:
        yield from (name.replace("*", str(expert)) for expert in range(shape[0]))


def read_packed_config(settings: Any, where: object) -> PackedConfig:
    """The config of a packed folder from its `quantization_config`.

    Raises SparseGPTError for other methods, newer format versions and what cannot be read.
    """
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        raise SparseGPTError(f'{where}: not packed here: config.json lacks quantization_config "{QUANT_METHOD}"')
    version = settings.get("format_version")
    if version not in READABLE_VERSIONS:
        raise SparseGPTError(
            f"{where}: packed format version {str(version)[:20]}; this package reads versions up to {FORMAT_VERSION}: "
            "update sparsegpt"
        )
    try:
        form = read_form(settings)
    except SparseGPTError as error:
        raise SparseGPTError(f"{where}: {error}") from error
    try:
        modules = {name: _read_shape(name, shape) for name, shape in settings["modules"].items()}
        transposed, stacked = (frozenset(settings.get(key, ())) for key in ("transposed", "stacked"))
        if not transposed | stacked <= modules.keys() or not all("*" in name for name in stacked):
            raise ValueError("transposed or stacked names that are no modules")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparseGPTError(
            f"{where}: quantization_config has no readable modules ({first_line(error)[:200]}); pack the model again"
        ) from error
    return PackedConfig(modules, transposed, stacked, form)


def _read_shape(name: str, shape: Any) -> tuple[int, ...]:
    """ValueError for anything but the sizes of a weight, each of which a tensor can have."""
    experts = name.count(".*.")
    if not name.isprintable() or name.count("*") != experts or experts > 1:
        raise ValueError(f"{ascii(name)[:80]} is no module")
    if not isinstance(shape, list | tuple) or len(shape) != 2 + experts:
        raise ValueError(f"{name}: expected {2 + experts} sizes")
    if not all(type(size) is int and 1 <= size <= _LARGEST for size in shape):
        raise ValueError(f"{name} is of shape {list(shape)}")
    return tuple(shape)
