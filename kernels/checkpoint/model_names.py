"""What a model calls the tensors of its checkpoints.

transformers renames tensors on loading, and joins those of experts: w1 and w3 of every expert become one parameter
gate_up_proj [E, 2 I, H]. Its own loader is asked here, on a model without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.experts import fused_experts

# <...>.<expert>.<part>.weight
_EXPERT_TENSOR = re.compile(r"(?:^|\.)(\d+)\.(\w+)\.weight$")
# What the loader may do with experts' matrices, with the dimension: lay them on top of one another and, of every
# expert, the outputs of one projection after those of another.
_KNOWN_OPERATIONS = {"MergeModulelist": 0, "Concatenate": 1}


@dataclass(frozen=True)
class Bank:
    """A parameter of a module that holds one projection of all experts.

    experts: the module's path. projection: the parameter's name in it. parts: the last names of a checkpoint's tensors
    that it is joined from, their outputs one after the other. stacked: a checkpoint holds it in one tensor as well;
    transposed: as [E, K, N] then.
    """

    experts: str
    projection: str
    parts: tuple[str, ...]
    stacked: bool
    transposed: bool = False


@dataclass(frozen=True)
class Destination:
    """What a checkpoint's tensor becomes: a parameter of the model, or part of one.

    module: whose `weight` it becomes as it is, or None. bank: the experts' bank it belongs to, if of a known form.
    """

    parameter: str
    module: nn.Module | None
    bank: Bank | None


class ModelNames:
    """The names of a model, which may be on the meta device; ask before anything in it is replaced."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._state = model.state_dict()

    def destination(self, tensor: str) -> Destination | None:
        """Where the loader puts a checkpoint's tensor; None where the model has no parameter for it."""
        parameter, source = self._rename(tensor)
        if parameter not in self._state:
            return None
        converter = next((entry for entry in self._converters if source in entry.source_patterns), None)
        owner, _, last = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        if self._state[parameter].ndim == 3:
            bank = _bank(owner, last, module, converter)
            reached = bank is not None and all(self._leads(*pair) for pair in _expert_paths(bank, tensor))
            return Destination(parameter, None, bank if reached else None)
        whole = last == "weight" and converter is None and self._leads(tensor.removesuffix(".weight"), owner)
        return Destination(parameter, module if whole else None, None)

    def unplaced(self, tensor: str) -> str:
        """What the loader calls a checkpoint's tensor for which the model has no parameter."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(tensor, self._renamings, self._converters)[0]
        return renamed

    def _leads(self, linear: str, path: str) -> bool:
        """Whether the loader puts the parts of a packed linear, called so in checkpoints, into the module at `path`."""
        from transformers.core_model_loading import rename_source_key

        found, source = rename_source_key(f"{linear}.meta", self._renamings, self._converters)
        prefix = f"{self.model.base_model_prefix}."
        return source is None and found.removeprefix(prefix) == f"{path}.meta".removeprefix(prefix)

    def _rename(self, tensor: str) -> tuple[str, str | None]:
        """The parameter's name and the converter's pattern that matched, as the loader finds them."""
        from transformers.core_model_loading import rename_source_key

        prefix, state = self.model.base_model_prefix, self._state
        renamed: tuple[str, str | None] = rename_source_key(tensor, self._renamings, self._converters, prefix, state)
        if renamed[0] not in state:  # a name that should not have been changed
            renamed = rename_source_key(tensor, [], [], prefix, state)
        return renamed


def _bank(path: str, projection: str, experts: nn.Module, converter: Any) -> Bank | None:
    try:
        form = fused_experts(path, experts)
    except SparseGPTError:
        return None
    if projection not in form.projections:
        return None
    if converter is None:
        return Bank(path, projection, (projection,), stacked=True, transposed=form.transposed)
    if form.transposed or any(_KNOWN_OPERATIONS.get(type(step).__name__) != step.dim for step in converter.operations):
        return None
    found = [_EXPERT_TENSOR.search(source.replace("*", "0")) for source in converter.source_patterns]
    parts = tuple(match[2] for match in found if match)
    return Bank(path, projection, parts, stacked=False) if len(parts) == len(found) else None


def _expert_paths(bank: Bank, tensor: str) -> list[tuple[str, str]]:
    """What a linear of this tensor is called in a packed checkpoint, and where it belongs; none for other tensors."""
    if bank.stacked:
        path, _, part = tensor.rpartition(".")
        return [(f"{path}.0.{part}", f"{bank.experts}.0.{bank.projection}")]
    found = _EXPERT_TENSOR.search(tensor)
    assert found is not None
    return [(tensor.removesuffix(".weight"), f"{bank.experts}.{found[1]}.{found[2]}")]
