"""The tensors of a model and those of the files that it was loaded from.

transformers renames tensors on loading, and joins some: the projections of all experts become one parameter. Its own
loader is asked which tensor became what, so that each goes back under the name that it came by.
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.mapped import SMALL, is_mapped, to_mapped
from sparsegpt.model.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Joined:
    """Tensors of the files that the loader turns into others. pattern: the part of the name that told it, for each."""

    target: str
    patterns: Mapping[str, str]
    converter: Any

    @property
    def targets(self) -> list[str]:
        """The model's tensors that come of them."""
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def join(self, model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the loader makes of the tensors of the files: {name in the model: tensor}."""
        converter = copy.deepcopy(self.converter)
        for name in sorted(self.patterns, key=natural):  # experts in the order of their numbers
            converter.add_tensor(self.target, name, self.patterns[name], tensors[name])
        joined = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in joined.items()}


@dataclass(frozen=True)
class CheckpointNames:
    """What became of the tensors of the files.

    same: {tensor of the model: its name in the files}. joined: {tensor of the model: what it comes of}. surplus: names
    of tensors that the model has no place for.
    """

    same: Mapping[str, str]
    joined: Mapping[str, Joined]
    surplus: tuple[str, ...]

    @classmethod
    def of(cls, model: "PreTrainedModel", stored: Iterable[str]) -> "CheckpointNames":
        """Ask the loader where the tensors of these names go; ask before anything in the model is replaced."""
        rename, found = _Renamer(model), _Found()
        for name in sorted(stored):
            target, pattern, converter = rename(name)
            if target not in rename.state or (target in found.same and pattern is None):
                found.surplus.append(name)  # of two that go to one place, the loader takes the first
            elif pattern is None:
                found.same[target] = name
            else:
                found.patterns[target][name] = pattern
                found.converters[target] = converter
        joined: dict[str, Joined] = {}
        for target, patterns in found.patterns.items():
            group = Joined(target, patterns, found.converters[target])
            joined |= dict.fromkeys(group.targets, group)
        return cls(found.same, joined, tuple(found.surplus))

    def within(self, targets: Container[str]) -> "CheckpointNames":
        """The same for a model that has only these of the tensors; what has no place in a block would be another's."""
        same = {target: name for target, name in self.same.items() if target in targets}
        joined = {target: group for target, group in self.joined.items() if target in targets}
        outside = tuple(name for name in self.surplus if not any(map(str.isdigit, name.split("."))))
        return CheckpointNames(same, joined, outside)

    def groups(self) -> list[Joined]:
        """Each group of joined tensors once."""
        return list({group.target: group for group in self.joined.values()}.values())

    def part(self, model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Joined tensors of the model as those of the files that they came of, by their names there."""
        from transformers.core_model_loading import revert_weight_conversion

        wanted = {name for target in tensors for name in self.joined[target].patterns}
        reverted = revert_weight_conversion(model, dict(tensors)) if tensors else {}
        return {_known(name, wanted, model): tensor for name, tensor in reverted.items()}

    def new_name(self, model: "PreTrainedModel", target: str) -> str:
        """What files of this model's kind would call a parameter that these files lack."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(model, {target: torch.empty(0)})
        return next(iter(reverted))

    def check(self, model: "PreTrainedModel", shapes: Mapping[str, tuple[int, ...]]) -> None:
        """That joined tensors go back to the names and shapes that they came from; SparseGPTError where not.

        Asked with tensors that have no content.
        """
        state = model.state_dict()
        for group in self.groups():
            try:
                empty = {name: torch.empty_like(state[name], device="meta") for name in group.targets}
                found = {name: tuple(tensor.shape) for name, tensor in self.part(model, empty).items()}
            except SparseGPTError:
                raise
            except Exception as error:  # of a conversion that transformers cannot undo
                raise _irreversible(group.target) from error
            if found != {name: shapes[name] for name in group.patterns}:
                raise _irreversible(group.target)


def restore_dtypes(
    names: CheckpointNames,
    source: Source,
    model: "PreTrainedModel",
    dtypes: tuple[torch.dtype, torch.dtype],
    scratch: Path,
) -> dict[Tensor, torch.dtype]:
    """Put the files' own tensors where the loader has made others of another dtype; {parameter: dtype to compute in}.

    dtypes: (stored, computing). The loader gives a model one dtype, and some tensors float32 as their code asks; both
    lose or add digits that files of mixed dtypes hold. scratch: a folder for what must be converted on the way.
    """
    stored, computing = dtypes
    working: dict[Tensor, torch.dtype] = {}
    for target, tensor in _other_dtypes(names, source, model):
        owner, _, last = target.rpartition(".")
        module = model.get_submodule(owner)
        made = model.get_parameter_or_buffer(target)
        if made in working:  # under the other name of a tied weight
            continue
        usual = computing if made.dtype == stored else made.dtype
        if isinstance(made, nn.Parameter):
            large = tensor.nbytes >= SMALL and not is_mapped(tensor)
            made.data = to_mapped(tensor, scratch) if large else tensor
            working[made] = usual
        else:
            module._buffers[last] = tensor.to(usual)
    return working


def _other_dtypes(names: CheckpointNames, source: Source, model: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors as the files have them, where the model has another dtype, by their names in the model."""
    state = model.state_dict()

    def differ(target: str, stored: Iterable[str]) -> bool:
        dtypes = {source.tensors[name].dtype for name in stored}
        return any(dtype.is_floating_point for dtype in dtypes) and dtypes != {state[target].dtype}

    plain = {name: target for target, name in names.same.items() if differ(target, [name])}
    yield from ((plain[name], tensor) for name, tensor in source.read(plain))
    for group in names.groups():
        if differ(group.target, group.patterns):
            tensors = dict(source.read(group.patterns))
            dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
            yield from group.join(model, {name: tensor.to(dtype) for name, tensor in tensors.items()}).items()


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts names with their numbers by size, numbers before words."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


@dataclass
class _Found:
    same: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    converters: dict[str, Any] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)


class _Renamer:
    """The renaming of transformers' loader."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.prefix, self.state = model.base_model_prefix, model.state_dict()

    def __call__(self, name: str) -> tuple[str, str | None, Any]:
        """The tensor of the model, or the first of several; the pattern and the converter that matched, if any."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if target not in self.state and name in self.state:  # a name that should not have been changed
            target, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return target, pattern, next((entry for entry in self.converters if pattern in entry.source_patterns), None)


def _known(name: str, wanted: set[str], model: "PreTrainedModel") -> str:
    """The same name with or without the prefix of the model's body, as the files have it."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in wanted:
            return candidate
    raise _irreversible(name)


def _irreversible(name: str) -> SparseGPTError:
    return SparseGPTError(
        f"{name} cannot be written as the tensors of the file that it came from: this transformers does not know the "
        "way back for them; save the model anew with it (from_pretrained, save_pretrained) and prune that"
    )
