"""Docstrings of public functions on tensors state shapes, and what they raise. Files are parsed, not imported."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"sparsegpt": "", "kernels": "kernels", "eval": "eval", "calib_data": "calib_data"}
LETTERS = re.compile(r"\[(?:[A-Z.][\w.]*(?:, [\w.+ ]+)*)?\]")
WORDS = re.compile(r"\[(?:[A-Za-z.][\w.]*(?:, [\w.+ ]+)*)?\]")


class Rule(NamedTuple):
    """What counts as a shape, and whether it must stand in the first paragraph or anywhere."""

    shape: re.Pattern[str]
    first: bool


# In solvers dimensions are letters, "[R, C] -> bool [R, C]"; where windows and hidden states flow they may be words,
# "[batch, sequence, features]". Of what `sparsegpt.__all__` takes from other rooms a shape anywhere is asked.
ROOMS = {
    "sparsegpt/solvers": Rule(LETTERS, True),
    "sparsegpt/recovery": Rule(WORDS, True),
    "calib_data": Rule(WORDS, True),
    **{f"kernels/{room}": Rule(LETTERS, True) for room in ("format", "cpu", "gpu", "dispatch", "layers")},
    **{f"kernels/{room}": Rule(LETTERS, False) for room in ("checkpoint", "hf")},
}
ANYWHERE = Rule(WORDS, False)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A public function, method or class. own: the nodes that it answers for, and not one inside it."""

    name: str
    docstring: str
    annotations: tuple[ast.expr, ...]
    own: tuple[ast.AST, ...]


def is_public(name: str) -> bool:
    return not name.startswith("_")


def documented(tree: ast.Module) -> Iterator[Documented]:
    """Public functions, public classes (with what builds them) and their public methods and operators."""
    for node in tree.body:
        if isinstance(node, Function) and is_public(node.name):
            yield of_function(node, node.name)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            methods = [part for part in node.body if isinstance(part, Function)]
            yield of_class(node, [part for part in methods if part.name in ("__init__", "__post_init__")])
            for method in methods:
                # What has no docstring of its own inherits it, or is told by its class.
                if is_public(method.name) or (method.name.startswith("__") and ast.get_docstring(method)):
                    yield of_function(method, f"{node.name}.{method.name}")


def of_function(node: Function, name: str) -> Documented:
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [argument.annotation for argument in arguments if argument] + [node.returns]
    return Documented(name, ast.get_docstring(node) or "", tuple(filter(None, annotations)), tuple(inside(node)))


def of_class(node: ast.ClassDef, builders: list[Function]) -> Documented:
    """A class answers for its fields, and for what builds it."""
    fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
    made = [of_function(builder, builder.name) for builder in builders]
    annotations = [*fields, *(annotation for one in made for annotation in one.annotations)]
    own = [part for one in made for part in one.own]
    return Documented(node.name, ast.get_docstring(node) or "", tuple(annotations), tuple(own))


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function's body, without the functions in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from inside(child)


def names_in(node: ast.AST) -> set[str]:
    """All identifiers of an expression; annotations in quotes are read."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            found.add(part.value)
    return found


def tensor_names(trees: list[ast.Module]) -> set[str]:
    """Tensor, and the names that modules give to types made of it, such as `Batch = tuple[Tensor, Tensor]`."""
    found = {"Tensor", "LongTensor"}
    aliases = [
        (target.id, node.value)
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id[:1].isupper() and not target.id.isupper()
    ]
    while new := {name for name, value in aliases if names_in(value) & found} - found:
        found |= new
    return found


def faults(one: Documented, tensors: set[str], rule: Rule) -> list[str]:
    """What a docstring fails to say."""
    found = []
    searched = one.docstring.split("\n\n")[0] if rule.first else one.docstring
    on_tensors = any(names_in(annotation) & tensors for annotation in one.annotations)
    if on_tensors and not rule.shape.search(searched):
        found.append(f"{one.name}: shapes, such as [R, C] -> bool [R, C]" + ", in its first paragraph" * rule.first)
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in one.own)
    if raises and not re.search(r"\bRaises\b", one.docstring):
        found.append(f"{one.name}: what it raises")
    return found


def faults_of(source: str, rule: Rule = ROOMS["sparsegpt/solvers"]) -> list[str]:
    tree = ast.parse(source)
    tensors = tensor_names([tree])
    return [fault for one in documented(tree) for fault in faults(one, tensors, rule)]


# The files


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


RULES = {path: rule for room, rule in ROOMS.items() for path in sorted((ROOT / room).glob("*.py"))}
TENSORS = tensor_names([parse(path) for path in RULES])


@pytest.mark.parametrize("path", RULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_functions_on_tensors_begin_with_shapes_and_say_what_they_raise(path):
    assert not [fault for one in documented(parse(path)) for fault in faults(one, TENSORS, RULES[path])]


def file_of(module: str) -> Path:
    """The file of `sparsegpt.solvers.layer`; of a package, its __init__.py."""
    parts = module.split(".")[1:]
    top = parts[0] if parts and parts[0] in FOLDERS else "sparsegpt"
    path = ROOT / Path(top, *(parts[1:] if top != "sparsegpt" else parts))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def exported(path: Path) -> list[str]:
    """What `__all__` lists."""
    [listed] = [
        node.value
        for node in parse(path).body
        if isinstance(node, ast.Assign) and "__all__" in {ast.unparse(target) for target in node.targets}
    ]
    return [str(name) for name in ast.literal_eval(listed)]


def home_of(name: str, path: Path) -> tuple[Path, ast.AST] | None:
    """The file and node that define a name which `path` defines, or imports from where it is defined."""
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return home_of(name, file_of(node.module))
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return path, node
    return None


PACKAGE = ROOT / "sparsegpt" / "__init__.py"


@pytest.mark.parametrize("name", [name for name in exported(PACKAGE) if is_public(name)])
def test_everything_exported_states_shapes_and_what_it_raises(name):
    found = home_of(name, PACKAGE)
    assert found, f"{name} is defined nowhere"
    path, node = found
    rule, whole = RULES.get(path, ANYWHERE), ast.Module([node], [])
    assert not [fault for one in documented(whole) for fault in faults(one, TENSORS, rule)]


# The checker


def test_the_exported_names_lead_to_functions_and_classes():
    homes = {name: home_of(name, PACKAGE) for name in ("prune_weight", "prune_model", "perplexity", "NM", "nothing")}
    assert {name: home and home[0].relative_to(ROOT).as_posix() for name, home in homes.items()} == {
        "prune_weight": "sparsegpt/solvers/layer.py",
        "prune_model": "sparsegpt/driver/pipeline.py",
        "perplexity": "eval/perplexity.py",
        "NM": "sparsegpt/sparsity.py",
        "nothing": None,
    }


GOOD = '''
from torch import Tensor
Pair = tuple[Tensor, Tensor]
Pairs = list[Pair]
def f(x: Tensor) -> None:
    """[R, C]: what is done with it. Raises ValueError if nothing is."""
    raise ValueError
def g(x: Pairs, y: "Tensor | None" = None) -> None:
    """Pairs of [..., C]."""
    def inner() -> None:
        raise ValueError
def h(x: int) -> int:
    """Nothing of the kind."""
def _private(x: Tensor) -> Tensor:
    raise ValueError
class A:
    """Holds x [R, C + 1]. Raises ValueError."""
    x: Tensor
    def __post_init__(self) -> None:
        raise ValueError
    def m(self) -> Tensor:
        """Its x, [R, C + 1]."""
    def again(self) -> int:
        """One."""
        try:
            return 1
        except ValueError:
            raise
'''
SHAPES, RAISES = ", in its first paragraph", "what it raises"


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("[R, C]: what", "What", f"f: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("[R, C]: what", "In [0, 1]: what", f"f: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("[R, C]: what", "What.\n\n    [R, C]: what", f"f: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        (" Raises ValueError if nothing is.", "", f"f: {RAISES}"),
        ("Pairs of [..., C].", "Pairs.", f"g: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("x: int) -> int", "x: int) -> Tensor", f"h: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("x: int) -> int", 'x: int, *more: "Tensor") -> int', f"h: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("x: int) -> int", "x: int, *, y: torch.Tensor) -> int", f"h: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("Holds x [R, C + 1].", "Holds x.", f"A: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        (" Raises ValueError.", "", f"A: {RAISES}"),
        ("Its x, [R, C + 1].", "Its x.", f"A.m: shapes, such as [R, C] -> bool [R, C]{SHAPES}"),
        ("            raise\n", "            raise ValueError\n", f"A.again: {RAISES}"),
    ],
)
def test_the_checker_finds_what_is_missing(before, after, fault):
    assert faults_of(GOOD) == []
    assert GOOD.count(before) == 1
    assert faults_of(GOOD.replace(before, after)) == [fault]


@pytest.mark.parametrize(
    ("text", "letters", "words"),
    [
        ("[R, C]", True, True),
        ("[..., C]", True, True),
        ("a scalar []", True, True),
        ("[...]", True, True),
        ("[M, K + 1]", True, True),
        ("[N] or [1, N]", True, True),
        ("[samples, sequence_length]", False, True),
        ("[in, in]", False, True),
        ("in [0, 1]", False, False),
        ("[[rule]]", False, True),
        ('[{"modules": 1}]', False, False),
        ("R x C", False, False),
    ],
)
def test_what_counts_as_a_shape(text, letters, words):
    assert (bool(LETTERS.search(text)), bool(WORDS.search(text))) == (letters, words)


def test_words_and_later_paragraphs_do_where_the_rule_is_loose():
    source = 'def f(x: Tensor) -> None:\n    """Do it.\n\n    x: LongTensor [samples, sequence_length].\n    """\n'
    words_first = ROOMS["sparsegpt/recovery"]
    assert faults_of(source, ANYWHERE) == []
    assert len(faults_of(source, words_first)) == 1
    assert faults_of(source.replace("Do it", "[batch, sequence]"), words_first) == []
    assert len(faults_of(source.replace("[samples, sequence_length]", "in [0, 1]"), ANYWHERE)) == 1
