"""Every weight of a model is accounted for: pruned, left dense by choice, or not prunable and why.

The three lists hold every parameter of the model once, by its name; one that is pruned in part (some of the experts
that it holds) stands in several, each with its share. Their counts add up to the model's parameters.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sparsegpt.driver.refusals import added_linears
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.routers import Mixture, is_of_experts, mixture_of
from sparsegpt.model.unfuse import sources, unfused

# Weights by the name of their parameter.
Counts = Mapping[str, int]
# Above this share of the blocks' matrices what stays dense unasked is told; experts always.
WORTH_A_WARNING = 0.02
NAMES_IN_A_WARNING = 3

# Reasons why a weight is not prunable.
VECTOR, ROUTER, EMBEDDING = "a norm, a bias or another vector", "a router or a gate of experts", "the embedding"
OUTSIDE, TABLE, CONVOLUTION = "outside of the decoder blocks", "a table of an embedding", "a kernel of a convolution"
NO_ROWS = "rows of experts that compute nothing"
ADDED = "of a linear that the model's class does not have"
UNREACHED = "never called in a forward pass, so that no input of it can be seen"
NO_HEAD = "the output layer, which is no linear"
# Those that nobody expects to be pruned.
EXPECTED = frozenset((VECTOR, ROUTER, EMBEDDING, OUTSIDE, NO_HEAD))
# Reasons of a choice.
NOT_SELECTED, OTHER_BLOCK, BY_RECIPE = "not selected", "in a block that was not selected", "left dense by the recipe"
HEAD_NOT_ASKED = "the output layer, which was not asked for"

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Found:
    """A linear that can be pruned: its block's index, weight shape [out_features, in_features], weight's parameter."""

    block: int
    shape: tuple[int, int]
    parameter: str


@dataclass(frozen=True)
class Survey:
    """What a model consists of.

    linears: those that can be pruned, by full name. sizes: every parameter's count of weights. reasons: why what no
    linear shows of a parameter cannot be pruned. matrices: parameters of the blocks that are no vectors. head: the
    output layer's parameter and its weights; no part of `sizes` while it is tied to the embedding.
    """

    linears: Mapping[str, Found]
    sizes: Counts
    reasons: Mapping[str, str]
    matrices: frozenset[str]
    head: tuple[str, int] | None

    def of_block(self, index: int) -> dict[str, tuple[int, int]]:
        """Shapes of the linears of a block, by full name."""
        return {name: found.shape for name, found in self.linears.items() if found.block == index}

    def without(self, names: Iterable[str], reason: str) -> "Survey":
        """The same where these linears cannot be pruned after all."""
        lost = {name: self.linears[name] for name in names if name in self.linears}
        linears = {name: found for name, found in self.linears.items() if name not in lost}
        reasons = {**self.reasons, **{found.parameter: reason for found in lost.values()}}
        return replace(self, linears=linears, reasons=reasons)


@dataclass(frozen=True)
class Accounting:
    """The three lists: weights by parameter; of those that stay dense, by reason."""

    pruned: Counts = field(default_factory=dict)
    left_dense_by_choice: Mapping[str, Counts] = field(default_factory=dict)
    not_prunable: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All weights of the model."""
        lists = [self.pruned, *self.left_dense_by_choice.values(), *self.not_prunable.values()]
        return sum(sum(counts.values()) for counts in lists)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json, names that differ in numbers alone together: `layers.{0-31}.mlp.up_proj`."""
        return {
            "total": self.total,
            "pruned": _described(self.pruned),
            "left_dense_by_choice": _by_reason(self.left_dense_by_choice),
            "not_prunable": _by_reason(self.not_prunable),
        }


def survey(decoder: DecoderModel) -> Survey:
    """Look a model over; SparseGPTError for linears that are wrapped."""
    added = added_linears(decoder)
    sizes = {name: parameter.numel() for name, parameter in decoder.model.named_parameters()}
    shared = _shared_by(decoder.model)
    linears: dict[str, Found] = {}
    reasons: dict[str, str] = {}
    matrices: set[str] = set()
    for index, (prefix, block) in enumerate(decoder.by_prefix()):
        found, unprunable = _in_block(block)
        for name, (shape, parameter) in found.items():
            others = shared.get(prefix + parameter)
            if prefix + name in added or others:
                unprunable[parameter] = ADDED if prefix + name in added else f"shared with {others}"
            else:
                linears[prefix + name] = Found(index, shape, prefix + parameter)
        reasons |= {prefix + name: reason for name, reason in unprunable.items()}
        matrices |= {prefix + name for name, parameter in block.named_parameters() if not _is_vector(parameter)}
    return Survey(linears, sizes, _outside(decoder) | reasons, frozenset(matrices & sizes.keys()), _head(decoder))


def account(
    found: Survey, choices: Mapping[str, object | None], blocks: frozenset[int], *, with_head: bool
) -> Accounting:
    """The three lists. choices: what is selected, None for what the recipe leaves dense; blocks: those selected."""
    pruned: dict[str, int] = defaultdict(int)
    by_choice: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    left = dict(found.sizes)
    for name, linear in found.linears.items():
        size = math.prod(linear.shape)
        left[linear.parameter] -= size
        if choices.get(name) is not None:
            pruned[linear.parameter] += size
        else:
            reason = BY_RECIPE if name in choices else NOT_SELECTED if linear.block in blocks else OTHER_BLOCK
            by_choice[reason][linear.parameter] += size
    if found.head is not None:
        name, size = found.head  # a tied one gets a weight of its own where it is pruned
        if left.pop(name, 0) or with_head:
            (pruned if with_head else by_choice[HEAD_NOT_ASKED])[name] = size
    not_prunable: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in left.items():
        if size:
            not_prunable[found.reasons.get(name, NO_ROWS)][name] = size
    return Accounting(dict(pruned), {why: dict(counts) for why, counts in by_choice.items()}, dict(not_prunable))


def unasked_note(
    found: Survey, accounting: Accounting, select: Callable[[str], bool], prefixes: tuple[str, ...]
) -> str:
    """One line on matrices of the selected blocks that stay dense although nothing asked for it; "" for next to none.

    prefixes: what the names in these blocks begin with.
    """
    reasons = {
        reason: {name: n for name, n in counts.items() if name.startswith(prefixes) and select(_owner(name))}
        for reason, counts in accounting.not_prunable.items()
        if reason not in EXPECTED
    }
    whole = sum(found.sizes[name] for name in found.matrices if name.startswith(prefixes))
    share = sum(sum(counts.values()) for counts in reasons.values()) / max(1, whole)
    experts = any(counts and is_of_experts(name) for counts in reasons.values() for name in counts)
    if share < WORTH_A_WARNING and not experts:
        return ""
    told = "; ".join(f"{some(counts)}: {reason}" for reason, counts in reasons.items() if counts)
    return f"{share:.1%} of the weights in the pruned blocks stay dense although nothing asked for it: {told}"


def _in_block(block: nn.Module) -> tuple[dict[str, tuple[tuple[int, int], str]], dict[str, str]]:
    """The prunable linears of a block, each with its shape and parameter, and why other parameters cannot be pruned."""
    with unfused(block):
        kept_in, mixture, prunable = sources(block), mixture_of(block), prunable_linears(block)
        found = {
            name: ((linear.out_features, linear.in_features), kept_in[name])
            for name, linear in prunable.items()
            if name in kept_in
        }
        others = {name: type(block.get_submodule(name)).__name__ for name in kept_in if name not in prunable}
    shown = {parameter for _, parameter in found.values()}
    odd = {
        kept_in[name]: ROUTER if name in mixture.routers else f"of {kind}, which computes otherwise than a linear"
        for name, kind in others.items()
    }
    reasons = {
        name: odd.get(name) or (VECTOR if name.removesuffix("_bias") in shown else _reason(name, block, mixture))
        for name, _ in block.named_parameters()
        if name not in shown
    }
    return found, reasons


def _reason(name: str, block: nn.Module, mixture: Mixture) -> str:
    """Why a parameter of a block that belongs to no linear cannot be pruned."""
    if _is_vector(block.get_parameter(name)):
        return VECTOR
    if name in mixture.routers:
        return ROUTER
    owner = block.get_submodule(_owner(name))
    if isinstance(owner, nn.Embedding):
        return TABLE
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONVOLUTION
    kind = type(owner).__name__
    if is_of_experts(name) or is_of_experts(kind):
        return f"of experts in a form that is not known ({kind})"
    return f"of {kind}, which is no linear"


def _shared_by(model: nn.Module) -> dict[str, str]:
    """Parameters whose numbers belong to another name as well, each with the first such name."""
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta" and parameter.numel():
            names[parameter.data_ptr(), parameter.numel()].append(name)
    together = [found for found in names.values() if len(found) > 1]
    return {name: next(other for other in found if other != name) for found in together for name in found}


def _outside(decoder: DecoderModel) -> dict[str, str]:
    """Why the parameters outside of the blocks stay as they are."""
    embedding, head = decoder.embedding.weight, decoder.model.get_output_embeddings()
    of_head = set(map(id, head.parameters())) if head is not None else set()

    def reason(parameter: nn.Parameter) -> str:
        if parameter is embedding:
            return EMBEDDING
        if id(parameter) not in of_head:
            return OUTSIDE
        return VECTOR if _is_vector(parameter) else NO_HEAD

    inside = tuple(prefix for prefix, _ in decoder.by_prefix())
    parameters = decoder.model.named_parameters()
    return {name: reason(parameter) for name, parameter in parameters if not name.startswith(inside)}


def _head(decoder: DecoderModel) -> tuple[str, int] | None:
    head = decoder.model.get_output_embeddings()
    path = next((name for name, module in decoder.model.named_modules() if module is head), "")
    return (f"{path}.weight", head.weight.numel()) if isinstance(head, nn.Linear) else None


def _is_vector(parameter: nn.Parameter) -> bool:
    """Whether all but one of its dimensions are of size 1."""
    return not parameter.numel() or parameter.numel() == max(parameter.shape, default=1)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _by_reason(reasons: Mapping[str, Counts]) -> list[dict[str, Any]]:
    return [{"reason": reason, **_described(counts)} for reason, counts in reasons.items()]


def _described(counts: Counts) -> dict[str, Any]:
    return {"weights": sum(counts.values()), "parameters": len(counts), "names": in_braces(counts)}


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are; those that differ in numbers alone count as one."""
    names = in_braces(names)
    more = f" and {len(names) - NAMES_IN_A_WARNING} more" if len(names) > NAMES_IN_A_WARNING else ""
    return ", ".join(names[:NAMES_IN_A_WARNING]) + more


def in_braces(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone as one: "layers.0.up", "layers.1.up" -> "layers.{0-1}.up".

    Of several numbers in a name every combination must be there, else those of one first number are joined.
    """
    alike: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        alike[_NUMBER.sub("*", name)].append(tuple(map(int, _NUMBER.findall(name))))
    return [line for pattern, numbers in alike.items() for line in _joined(pattern, sorted(set(numbers)))]


def _joined(pattern: str, numbers: list[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) == len(numbers):
        return [_filled(pattern, columns)]
    return [line for _, same in itertools.groupby(numbers, lambda row: row[0]) for line in _joined(pattern, list(same))]


def _filled(pattern: str, columns: list[list[int]]) -> str:
    texts = iter(_ranges(column) for column in columns)
    return re.sub(r"\*", lambda _: next(texts), pattern)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; a single one as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
