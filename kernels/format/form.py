"""What a format of packed weights tells about itself: the interface through which files and layers go.

A form is one value for all packed weights of a folder or a layer: which pattern, and how the kept values are stored. A
format is a subclass of Form here, a table of kernels (dispatch), a layer (layers) and a row that names them together
(layers/forms.py).
Dimension key: N out_features, K in_features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor


class PackedWeight(Protocol):
    """A weight [N, K] in packed form; `dtype` is that of the numbers it stands for."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors together."""
        ...

    def settled(self) -> Self:
        """[N, K] -> the same weight as kernels take it: its tensors contiguous, themselves where they are."""
        ...


class Form(ABC):
    """How packed weights are stored.

    pattern: its name in config.json and for the user. demand: what a weight must keep, for the user. parts: what the
    tensors of a weight are called in files and layers.
    """

    pattern: ClassVar[str]
    demand: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def read(cls, settings: Mapping[str, Any]) -> Self | None:
        """The form that `settings` gave, or None for settings of another format.

        Raises SparseGPTError for settings of this format that it does not know.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data as config.json holds it, with the pattern; what is as usual is left out."""

    @classmethod
    @abstractmethod
    def samples(cls) -> Sequence[Form]:
        """The forms that measurements of kernels try."""

    @abstractmethod
    def of_model(self, dtype: torch.dtype) -> Form:
        """The form for weights of a model that is stored in `dtype`."""

    @abstractmethod
    def promised(self, sparsity: str) -> bool:
        """Whether a layer that a report says is pruned to this must be packable."""

    @abstractmethod
    def keeps(self, weight: Tensor) -> bool:
        """[N, K] -> whether a dense weight can be packed."""

    @abstractmethod
    def pack(self, weight: Tensor, name: str) -> Any:
        """[N, K] -> packed; SparseGPTError, with the name and where, for a weight that cannot be."""

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """Packed -> [N, K] in the packed weight's dtype."""

    @abstractmethod
    def tensors(self, packed: Any) -> tuple[Tensor, ...]:
        """Packed [N, K] -> its tensors as files and layers hold them, in the order of `parts` (no copy)."""

    @abstractmethod
    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Any:
        """Tensors in the order of `parts` -> packed [N, K] on them (no copy); SparseGPTError where they do not fit."""

    @abstractmethod
    def check(self, packed: Any) -> None:
        """Packed [N, K]. Raises SparseGPTError where its tensors hold what no packer writes and no kernel expects.

        For weights from files, once, before any kernel sees them; their shapes and dtypes `packed` has compared.
        """

    @property
    def rounding(self) -> str:
        """What packing does to the weights, for the user; "" where every bit is kept."""
        return ""

    @abstractmethod
    def stored(self, packed: Any) -> str:
        """Packed [N, K] -> how its values are stored, for the user: a dtype, or what they were rounded to."""
