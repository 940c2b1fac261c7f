"""Mixtures of experts inside a block: which modules are experts, and which matrices choose among them.

A router is known by what it does. It stands near a group of experts, reads what they read, and has one output an
expert. Names and the counts that modules and configurations give ("num_experts") settle what this leaves open: a
router with outputs for more than the experts (those that compute nothing, or are shared), and a matrix that has as
many outputs by chance.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

# A linear of an expert: the path of the list of experts, the expert's index, the linear's name inside the expert.
ExpertLinear = tuple[str, int, str]

# Experts in a list (`experts.3.w1`, `moe.local_experts.expert_3.w1`), or each by a name of its own (`expert_3.w1`).
_EXPERTS = (
    re.compile(
        r"^(.*?(?:^|\.)(?![^.]*shared)[^.]*expert[^.]*(?:\.(?!shared)[a-z_]+)*?)\.(?:[^.]*_)?(\d+)\.(.+)$", re.I
    ),
    re.compile(r"^(.*?(?:^|\.)(?![^.]*shared)[^.]*expert[^.]*?)_?(\d+)\.(.+)$", re.I),
)
_LAST_NUMBER = re.compile(r"^(.+)\.(?:[^.]*_)?(\d+)\.(.+)$")
_NUMBER = re.compile(r"(?:^|_)(\d+)$")
# Attributes of modules and keys of configurations that count experts: num_experts, n_routed_experts, zero_expert_num.
_COUNTS = re.compile(r"expert", re.I), re.compile(r"^n_|num|count|total", re.I), re.compile(r"per_tok|shared_expert_")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
_GATES = {"gate", "gating", "wg"}


def expert_of(name: str) -> ExpertLinear | None:
    """ "mlp.experts.3.down_proj" -> ("mlp.experts", 3, "down_proj"); None for a linear that every token reaches."""
    found = next(filter(None, (pattern.match(name) for pattern in _EXPERTS)), None)
    return (found[1], int(found[2]), found[3]) if found else None


def named_expert(name: str) -> ExpertLinear:
    """`expert_of` for what is known to be an expert's, whatever its list is called."""
    found = _LAST_NUMBER.match(name)
    return expert_of(name) or ((found[1], int(found[2]), found[3]) if found else (name, 0, ""))


class Matrix(NamedTuple):
    """A matrix by its path in the block: [outputs, inputs]; of a parameter that is no linear, as it is stored."""

    path: str
    outputs: int
    inputs: int
    is_linear: bool


@dataclass(frozen=True)
class Group:
    """Experts that stand side by side: the path of what holds them, how many, the widths of their matrices.

    members: whether each is a module of its own, called by its index.
    """

    path: str
    count: int
    widths: frozenset[int]
    members: bool


@dataclass(frozen=True)
class Mixture:
    """The groups of experts of a block, and what chooses among them: linears and parameters, by their paths."""

    groups: tuple[Group, ...] = ()
    routers: frozenset[str] = field(default_factory=frozenset)

    def expert_of(self, name: str) -> ExpertLinear | None:
        """As the function of this name, also for experts in a list that is not called so."""
        if found := expert_of(name):
            return found
        for group in self.groups:
            index, _, rest = name.removeprefix(f"{group.path}.").partition(".")
            if group.members and name.startswith(f"{group.path}.") and (number := _NUMBER.search(index)) and rest:
                return (group.path, int(number[1]), rest)
        return None


def mixture_of(block: nn.Module) -> Mixture:
    """What a block has of experts and routers; nothing of either in a dense block."""
    counts = _counts(block)
    groups = list(_groups(block, counts))
    matrices = list(_matrices(block, groups))
    routers = {matrix.path for matrix in matrices if _is_called(matrix.path, _routes)}
    kept = []
    for group in groups:
        found = _routers_near(group, matrices, counts)
        if found or _is_called(group.path, _holds_experts) or not group.members:
            kept.append(group)
            routers |= found
    return Mixture(tuple(kept), frozenset(routers))


def _groups(block: nn.Module, counts: frozenset[int]) -> Iterator[Group]:
    """Lists of equal modules with matrices, and modules that keep the matrices of several experts in one parameter.

    A list counts when its name says so, or when no other does and its length is a number of experts.
    """
    unnamed, named = [], False
    for path, module in block.named_modules():
        if group := _stacked(path, module, counts) or _listed(path, module):
            if _is_called(path, _holds_experts) or not group.members:
                named = True
                yield group
            elif group.count in counts:
                unnamed.append(group)
    if not named:
        yield from unnamed


def _listed(path: str, module: nn.Module) -> Group | None:
    """A module whose children are numbered, of one class, and have matrices."""
    children = list(module.named_children())
    alike = {type(child) for _, child in children}
    if len(children) < 2 or len(alike) > 1 or not all(_NUMBER.search(name) for name, _ in children):
        return None
    shapes = [tuple(parameter.shape) for parameter in children[0][1].parameters() if parameter.ndim > 1]
    if not shapes or "shared" in path:
        return None
    return Group(path, len(children), frozenset(width for shape in shapes for width in shape), members=True)


def _stacked(path: str, module: nn.Module, counts: frozenset[int]) -> Group | None:
    """A module with parameters [E, .., ..] for E experts or, where its name speaks of experts, [E * R, C]."""
    own = [parameter.shape for parameter in module.parameters(recurse=False)]
    if "shared" in path or any(part.isdigit() for part in path.split(".")):
        return None
    said = _is_called(path, _holds_experts) or _holds_experts(_words(type(module).__name__))
    deep = [shape for shape in own if len(shape) == 3 and min(shape) > 1]
    if deep and (said or deep[0][0] in counts) and not isinstance(module, nn.Conv1d):
        return Group(path, deep[0][0], frozenset(w for shape in deep for w in shape[1:]), members=False)
    flat = [shape for shape in own if len(shape) == 2]
    if said and flat and not isinstance(module, nn.Linear | nn.Embedding):
        count = next((count for count in sorted(counts, reverse=True) if count > 1 and not flat[0][0] % count), 1)
        return Group(path, count, frozenset((flat[0][0] // count, flat[0][1])), members=False)
    return None


def _matrices(block: nn.Module, groups: list[Group]) -> Iterator[Matrix]:
    """Every matrix of the block outside of experts."""
    inside = tuple(f"{group.path}." for group in groups)
    for path, module in block.named_modules():
        if f"{path}.".startswith(inside):
            continue
        if isinstance(module, nn.Linear):
            yield Matrix(path, module.out_features, module.in_features, is_linear=True)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2:
                outputs, inputs = parameter.shape
                yield Matrix(f"{path}.{name}".strip("."), outputs, inputs, is_linear=False)


def _routers_near(group: Group, matrices: list[Matrix], counts: frozenset[int]) -> set[str]:
    """Paths of the matrices that choose among a group's experts, and of gates beside them."""
    parent = group.path
    while parent:
        parent = parent.rpartition(".")[0]
        near = [matrix for matrix in matrices if _is_inside(matrix.path, parent) and not _attends(matrix.path, parent)]
        if found := _routers_among(group, near, parent, counts):
            roots = {_root(matrix.path, parent) for matrix in found}
            gates = {matrix.path for matrix in near if matrix.outputs == 1}
            return gates | {matrix.path for matrix in near if any(_is_inside(matrix.path, root) for root in roots)}
    return set()


def _routers_among(group: Group, near: list[Matrix], parent: str, counts: frozenset[int]) -> list[Matrix]:
    """The best evidence there is: name and count, then count and width, then a gate's name alone."""
    many = {group.count, group.count + 1, *counts} | {group.count + count for count in counts}
    called = [
        matrix
        for matrix in near
        if _is_called(_below(matrix.path, parent), _routes)
        or (_is_called(_below(matrix.path, parent), _gates) and many & {matrix.outputs, matrix.inputs})
    ]
    if called:
        return called
    counted = [matrix for matrix in near if _could_choose(matrix, group, near)]
    if counted:
        nearest = min(matrix.path.count(".") for matrix in counted)
        return [matrix for matrix in counted if matrix.path.count(".") == nearest]
    return [matrix for matrix in near if _is_called(_below(matrix.path, parent), _gates)]


def _could_choose(matrix: Matrix, group: Group, near: list[Matrix]) -> bool:
    """Whether a matrix reads what the experts read and has an output an expert, which no sibling turns back again."""
    if not matrix.is_linear:
        return group.count in (matrix.outputs, matrix.inputs) and bool({matrix.outputs, matrix.inputs} & group.widths)
    owner = matrix.path.rpartition(".")[0]
    turned_back = any(
        other.path.rpartition(".")[0] == owner and (other.inputs, other.outputs) == (matrix.outputs, matrix.inputs)
        for other in near
        if other.path != matrix.path
    )
    return matrix.outputs == group.count and matrix.inputs in group.widths and not turned_back


def _root(path: str, parent: str) -> str:
    """The outermost module below `parent` on the way to a router that is called one, else the router's own module."""
    parts, start = path.split("."), len(parent.split(".")) if parent else 0
    for end in range(start + 1, len(parts) + 1):
        words = _words(parts[end - 1])
        if _routes(words) or _gates(words):
            return ".".join(parts[:end])
    owner = path.rpartition(".")[0]
    return path if owner == parent else owner


def _counts(block: nn.Module) -> frozenset[int]:
    """Numbers of experts, more than one, that the block's modules and their configurations give."""
    found: set[int] = set()
    configs: dict[int, Any] = {}
    for module in block.modules():
        found.update(_counts_in(vars(module)))
        for value in vars(module).values():
            if hasattr(value, "to_dict") and not isinstance(value, nn.Module):
                configs[id(value)] = value
    for config in configs.values():
        found.update(_counts_in(vars(config)))
    return frozenset(count for count in found if count > 1)


def _counts_in(values: dict[str, Any]) -> Iterator[int]:
    about, counts, others = _COUNTS
    for name, value in values.items():
        if about.search(name) and counts.search(name) and not others.search(name):
            for count in value if isinstance(value, list | tuple) else [value]:
                if isinstance(count, int) and not isinstance(count, bool):
                    yield count


def _is_inside(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")


def _below(path: str, parent: str) -> str:
    return path.removeprefix(f"{parent}.") if parent else path


def _attends(path: str, parent: str) -> bool:
    """Whether a matrix belongs to attention that lies between it and `parent`."""
    return any("attn" in part or "attention" in part for part in _below(path, parent).split(".")[:-1])


def _is_called(path: str, means: Callable[[list[str]], bool]) -> bool:
    return any(means(_words(part)) for part in path.split("."))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _routes(words: list[str]) -> bool:
    return any(word.startswith("rout") and word != "routed" for word in words)


def _gates(words: list[str]) -> bool:
    """A gate stands last in its name: `gate`, `shared_expert_gate`, `wg`; not gate_proj, half of an MLP."""
    return bool(words) and words[-1] in _GATES


def _holds_experts(words: list[str]) -> bool:
    return any(word.startswith("expert") for word in words) and "shared" not in words


def is_of_experts(name: str) -> bool:
    """Whether a path, or the name of a class, speaks of experts, be they routed or shared."""
    return _is_called(name, lambda words: any(word.startswith("expert") for word in words))
