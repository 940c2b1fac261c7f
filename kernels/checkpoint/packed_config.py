"""What config.json says of a packed folder: the `quantization_config` of our own.

    modules     {name: [N, K]}, the dense shape of each packed linear; a name with a * is that of all experts of a layer
                at once, with shape [E, N, K]: its linears are the names with 0 to E - 1 in place of the *
    transposed  names whose weights an ordinary folder keeps as [K, N] (Conv1D, some experts)
    stacked     names with a * whose weights an ordinary folder keeps in one tensor, called without the `*.`; all other
                weights are called <linear>.weight there
    values      how the kept values are rounded to integers; absent where they are not
Dimension key: N out_features, K in_features, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.pack import Packed24, unpack
from sparsegpt.kernels.format.quantized import Quantized24, check_settings, dequantize

QUANT_METHOD = "sparsegpt"
FORMAT_VERSION = 1
PATTERN = "2:4"


@dataclass(frozen=True)
class IntegerValues:
    """Kept values stored as integers of `bits`, one scale for `group_size` columns; `dtype` is what they were."""

    bits: int
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"int{self.bits}, groups of {self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"bits": self.bits, "group_size": self.group_size, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class PackedConfig:
    """A `quantization_config`: fields as in the head of the file."""

    modules: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()
    values: IntegerValues | None = None

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it; what is empty is left out."""
        settings: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "pattern": PATTERN,
            "modules": {name: list(shape) for name, shape in self.modules.items()},
        }
        if self.transposed:
            settings["transposed"] = sorted(self.transposed)
        if self.stacked:
            settings["stacked"] = sorted(self.stacked)
        return settings if self.values is None else {**settings, "values": self.values.to_dict()}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors of a packed linear."""
        return ("values", "meta") if self.values is None else ("words", "scales", "meta")

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

    def ordinary_weights(self, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and weight of every packed tensor as an ordinary folder keeps it; tensor: look-up of a packed part."""
        for name, shape in self.modules.items():
            weights = (
                (linear, self._ordinary(name, unpack(self.packed(tensor, linear, shape[-2:]))))
                for linear in members(name, shape)
            )
            if name in self.stacked:
                yield stack_name(name), _stack((weight for _, weight in weights), shape[0])
            else:
                yield from ((f"{linear}.weight", weight.contiguous()) for linear, weight in weights)

    def _ordinary(self, name: str, weight: Tensor) -> Tensor:
        return weight.T if name in self.transposed else weight

    def packed(self, tensor: Callable[[str], Tensor], linear: str, shape: tuple[int, ...]) -> Packed24:
        """A packed linear's weight in floating point, from a look-up of its parts."""
        size = (shape[0], shape[1])
        parts = [tensor(f"{linear}.{part}") for part in self.parts]
        if self.values is None:
            return Packed24(parts[0], parts[1], size)
        words, scales, meta = parts
        values = self.values
        whole = Quantized24(words, scales.view(torch.float16), meta, size, values.bits, values.group_size)
        return dequantize(whole, values.dtype)


def _stack(matrices: Iterator[Tensor], count: int) -> Tensor:
    """`torch.stack` of so many matrices with one of them beside the result."""
    first = next(matrices)
    whole = first.new_empty(count, *first.shape)
    whole[0] = first
    for place, matrix in enumerate(matrices, 1):
        whole[place] = matrix
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
    if version != FORMAT_VERSION or settings.get("pattern") != PATTERN:
        raise SparseGPTError(
            f"{where}: packed format version {version} with pattern {settings.get('pattern')}; this package reads "
            f"version {FORMAT_VERSION} with {PATTERN}: update sparsegpt"
        )
    try:
        modules = {str(name): _read_shape(name, shape) for name, shape in settings["modules"].items()}
        transposed, stacked = (frozenset(settings.get(key, ())) for key in ("transposed", "stacked"))
        if not transposed | stacked <= modules.keys() or not all("*" in name for name in stacked):
            raise ValueError("transposed or stacked names that are no modules")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SparseGPTError(f"{where}: quantization_config has no readable modules; pack the model again") from error
    return PackedConfig(modules, transposed, stacked, _read_values(settings, where))


def _read_shape(name: str, shape: Any) -> tuple[int, ...]:
    found = tuple(int(size) for size in shape)
    if len(found) != (3 if "*" in name else 2) or min(found) < 1:
        raise ValueError(f"{name}: {shape}")
    return found


def _read_values(settings: Mapping[str, Any], where: object) -> IntegerValues | None:
    values = settings.get("values")
    if values is None:
        return None
    try:
        found = IntegerValues(int(values["bits"]), int(values["group_size"]), getattr(torch, values["dtype"]))
        check_settings(found.bits, found.group_size)
    except (KeyError, TypeError, ValueError, AttributeError, SparseGPTError) as error:
        raise SparseGPTError(f"{where}: values {values} are not known to this package: update sparsegpt") from error
    return found
