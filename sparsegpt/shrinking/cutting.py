"""The smaller model is built by transformers, of its own configuration, and filled with what is kept of the larger.

Dimension key: N columns or experts that are kept, in ascending order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.routers import expert_of, mixture_of
from sparsegpt.model.unfuse import unfused
from sparsegpt.shrinking.shapes import Anatomy, Shape, Site, feeders_of, width_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What is kept of a block: columns of each site, LongTensor [N] by the name of its projection.
KeptColumns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """What is kept of a model. blocks: their indices. columns: of each of these blocks. experts: the same, by index."""

    blocks: tuple[int, ...]
    columns: Mapping[int, KeptColumns]
    experts: Mapping[int, Tensor]

    @classmethod
    def all_of(cls, anatomy: Anatomy) -> "Kept":
        """All blocks, and of each of them everything."""
        return cls(anatomy.full.blocks, {}, {})


@torch.no_grad()
def cut(anatomy: Anatomy, shape: Shape, kept: Kept) -> "PreTrainedModel":
    """A model of this shape that holds what is kept of the one looked over, which stays as it is.

    What stands outside of the blocks is shared by both. Raises SparseGPTError where the configuration makes another
    model than that.
    """
    model, smaller = anatomy.decoder.model, anatomy.blueprint(shape)
    blocks = smaller.get_submodule(anatomy.decoder.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for fresh, index in zip(blocks, kept.blocks, strict=True):
        block = anatomy.decoder.blocks[index]
        _check_kind(block, fresh, f"{anatomy.decoder.prefix(index)[:-1]}")
        fill(anatomy, index, fresh, kept.columns.get(index, {}), kept.experts.get(index))
    _share_outside(anatomy.decoder, smaller)
    smaller.generation_config = model.generation_config
    return smaller.eval()


def rehearse(anatomy: Anatomy, shape: Shape) -> None:
    """Cut each block to a shape, whatever is kept of it, and forget it. Raises SparseGPTError as `cut` does."""
    blocks = anatomy.blueprint(replace(shape, blocks=anatomy.full.blocks)).get_submodule(anatomy.decoder.family.blocks)
    experts = None if shape.experts in (None, anatomy.full.experts) else torch.arange(shape.experts)
    for index, fresh in enumerate(blocks.children()):
        sites = {site.name: width_in(site, shape, anatomy.decoder.model.config) for site in anatomy.sites[index]}
        fill(anatomy, index, fresh, {name: torch.arange(width) for name, width in sites.items()}, experts)
        fresh.to("meta")


def rows_of(site: Site, sections: tuple[str, ...], columns: Tensor) -> Tensor:
    """Kept columns of a site, [N] -> [M]: the rows of a linear that feed them."""
    found, start = [], 0
    for section in sections:
        if section == "own":
            rows, height = columns, site.width
        elif section == "pairs":
            rows, height = _spread(columns, 2), 2 * site.width
        else:
            rows, height = (
                _spread(columns[:: site.group] // site.group, site.head),
                site.width // site.group * site.head,
            )
        found.append(start + rows)
        start += height
    return torch.cat(found)


def _spread(units: Tensor, size: int) -> Tensor:
    """[N] -> [N size]: the members of units of neighbours."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


# {linear: (rows that are kept, columns that are kept)}, None for all.
_Cuts = dict[str, tuple[Tensor | None, Tensor | None]]


def _cuts(sites: tuple[Site, ...], columns: KeptColumns) -> _Cuts:
    found: _Cuts = {}
    for site in sites:
        if site.name in columns:
            kept = columns[site.name]
            found[site.name] = (None, kept)
            found |= {name: (rows_of(site, parts, kept), None) for name, parts in feeders_of(site).items()}
    return found


@torch.no_grad()
def fill(
    anatomy: Anatomy,
    index: int,
    fresh: nn.Module,
    columns: KeptColumns = MappingProxyType({}),
    experts: Tensor | None = None,
) -> None:
    """Give a block without weights what is kept of another one, in its dtypes and on its device.

    index: that one's. columns: LongTensor [N] of each site that has lost some; experts: LongTensor [N], None for all.
    Raises SparseGPTError where the block that the model's class makes is another one.
    """
    block, cuts = anatomy.decoder.blocks[index], _cuts(anatomy.sites[index], columns)
    first = next(block.parameters())
    routers = mixture_of(block).routers
    fresh.to(first.dtype).to_empty(device=first.device)
    plain = dict(fresh.named_parameters())
    with unfused(block), unfused(fresh):
        tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        for name, place in (*fresh.named_parameters(), *fresh.named_buffers()):
            source = _in_source(name, experts)
            value = _kept_of(tensors[source], source, cuts)
            if experts is not None and _routes(source, routers) and len(value) == anatomy.full.experts:
                value = value[experts]
            if value.shape != place.shape:
                raise SparseGPTError(
                    f"{name} would be {list(value.shape)}, and the model's class makes {list(place.shape)} of this "
                    "configuration: models of this form cannot be shrunk so"
                )
            if plain.get(name) is place:
                place.data = value.clone()  # in the dtype that it had
            else:
                place.data.copy_(value)
        for parameter in fresh.parameters():
            parameter.requires_grad_(first.requires_grad)


def _kept_of(tensor: Tensor, name: str, cuts: _Cuts) -> Tensor:
    path, _, last = name.rpartition(".")
    rows, columns = cuts.get(path, (None, None))
    if rows is not None:
        tensor = tensor[rows]
    return tensor[:, columns] if columns is not None and last == "weight" else tensor


def _in_source(name: str, experts: Tensor | None) -> str:
    """The name in the larger block of a tensor of the smaller one, whose experts have other numbers."""
    found = expert_of(name)
    if experts is None or found is None:
        return name
    path, index, rest = found
    return f"{path}.{int(experts[index])}.{rest}"


def _routes(name: str, routers: frozenset[str]) -> bool:
    """Whether a tensor has a row for each expert: a router's weight or bias, or a bias of its scores beside it."""
    path = name.rpartition(".")[0]
    return name in routers or path in routers or any(router.rpartition(".")[0] == path for router in routers)


def _check_kind(block: nn.Module, fresh: nn.Module, name: str) -> None:
    """SparseGPTError where the configuration makes another kind of block of one that has another index now."""
    kinds = [dict(_kind(each)) for each in (block, fresh)]
    if kinds[0] != kinds[1]:
        differ = sorted(key for key in kinds[0].keys() | kinds[1].keys() if kinds[0].get(key) != kinds[1].get(key))
        raise SparseGPTError(
            f"{name} would become another kind of block ({differ[0]}), as its configuration tells kinds by index: "
            "blocks of this model cannot leave",
            settings=("blocks",),
        )


def _kind(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Classes of the modules of a block, experts apart, and what they say in words and switches about themselves."""
    for path, module in block.named_modules():
        if expert_of(f"{path}.x") is None:
            yield path, type(module)
            for name, value in vars(module).items():
                said = isinstance(value, bool | str) or name == "sliding_window"
                if said and name != "training" and not name.startswith("_"):
                    yield f"{path}.{name}".lstrip("."), value


def _share_outside(decoder: DecoderModel, smaller: "PreTrainedModel") -> None:
    """Everything outside of the blocks: the very parameters and buffers of the larger model."""
    inside = f"{decoder.family.blocks}."
    for path, module in smaller.named_modules():
        if f"{path}.".startswith(inside) and path != decoder.family.blocks:
            continue
        original = decoder.model.get_submodule(path)
        for name in module._parameters:
            module._parameters[name] = original._parameters[name]
        for name in module._buffers:
            module._buffers[name] = original._buffers[name]
