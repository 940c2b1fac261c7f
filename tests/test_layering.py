"""One direction, no circles: a file imports only from lower floors, and the solvers need nothing but torch."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import CHILD_ENVIRONMENT, write_text

ROOT = Path(__file__).parents[1]
FOLDERS = {"sparsegpt": "sparsegpt", "kernels": "sparsegpt.kernels", "eval": "sparsegpt.eval"}
FOLDERS["calib_data"] = "sparsegpt.calib_data"

# From the ground up, one row a room: it may import from the rows above it in this table, and from itself.
ROOMS = (
    "errors",
    "lazy",
    "version",
    "counting",
    "sparsity",
    "grid",
    "strips",
    "quantization",
    "files",
    "incoming",
    "solvers",
    "calib_data",
    "settings",
    "model",
    "rotation",
    "recovery",
    "driver",
    "shrinking",
    "kernels.format",
    "kernels",  # its __init__ alone: what is exported
    "kernels.cpu",
    "kernels.gpu",
    "kernels.dispatch",
    "kernels.layers",
    "kernels.checkpoint",
    "kernels.export",
    "kernels.hf",
    "eval",
    "eval.report",
    "",  # sparsegpt/__init__.py: tells transformers of packed folders; what is heavy waits for its first use
    "run",
    "listeners",
    "eval.bench",
    "eval.studies",
    "cli",
    "__main__",
)
# Research code that imports these gets torch and einops, nothing else.
LIGHT_ROOMS = ("errors", "lazy", "version", "sparsity", "grid", "quantization", "strips", "solvers")
LIGHT_ROOMS += ("kernels", "kernels.format", "kernels.layers", "")
LIGHT = {"torch", "einops", "sparsegpt"} | set(sys.stdlib_module_names)
# The fused kernel is loaded only for tensors on a GPU, as the test of loaded modules below shows.
LIGHT_EXCEPTIONS = {"sparsegpt.solvers.fused": {"triton"}}
# Of the engine, what a packed model is made of: how transformers keeps experts, and files.
KERNELS_MAY_USE = {"errors", "lazy", "sparsity", "grid", "quantization", "strips", "files", "model"}
# A reader finds a file in a folder at a glance.
FILES_IN_A_FOLDER = 14
LINES_OF_A_FUNCTION = 60


def modules() -> dict[str, Path]:
    """Import name -> file, of everything that is shipped."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name: str, *, everywhere: bool = True) -> set[str]:
    """Absolute names that a module imports; at its top alone, or anywhere. Type checking does not count."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = tree_of(name)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in MODULES else source)
    return found


def room(name: str) -> str:
    """ "sparsegpt.kernels.gpu.portable" -> "kernels.gpu"; "sparsegpt.errors", which has no folder -> "errors"."""
    parts = name.split(".")[1:]
    if MODULES[name].name != "__init__.py":
        parts = parts[:-1] or parts
    return ".".join(parts)


def inner_imports(name: str, **options: bool) -> set[str]:
    return {found for found in imports(name, **options) if found in MODULES} - {name}


def rooms_entered(name: str) -> set[str]:
    return {room(target) for target in inner_imports(name)} - {room(name)}


@pytest.mark.parametrize("name", MODULES)
def test_every_file_has_a_room_and_imports_from_lower_rooms(name):
    lower = ROOMS[: ROOMS.index(room(name))]
    for entered in rooms_entered(name):
        assert entered in lower, f"{name} imports from {entered}"


def settled(graph: dict[str, set[str]]) -> set[str]:
    """What can be taken in an order in which imports come first: all of it, unless there is a circle."""
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    return done


def test_files_import_one_another_in_no_circle():
    """Imports inside functions count."""
    graph = {name: {target for target in inner_imports(name) if not is_package(target)} for name in MODULES}
    graph = {name: targets for name, targets in graph.items() if not is_package(name)}
    assert not graph.keys() - settled(graph)


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def test_rooms_form_no_circle():
    """Imports inside functions count."""
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        graph.setdefault(room(name), set()).update(rooms_entered(name))
    assert not graph.keys() - settled(graph)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_a_folder_is_read_at_a_glance(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= FILES_IN_A_FOLDER


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_longer_than_a_screen(name):
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION
    ]
    assert not long


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in LIGHT_ROOMS])
def test_light_rooms_import_torch_and_einops_alone(name):
    tops = {found.split(".")[0] for found in imports(name)}
    assert tops <= LIGHT | LIGHT_EXCEPTIONS.get(name, set())


@pytest.mark.parametrize("name", [name for name in MODULES if room(name).startswith("kernels")])
def test_kernels_use_little_of_the_engine(name):
    assert {entered for entered in rooms_entered(name) if not entered.startswith("kernels")} <= KERNELS_MAY_USE


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in ("cli", "__main__")])
def test_only_the_top_prints_or_exits(name):
    """print in a script's main, behind `if __name__`, is that script's own top."""
    tree = tree_of(name)
    if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
        return
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "exit", "sys.exit", "quit", "warnings.warn"}


def test_pruning_one_layer_loads_no_transformers(forked_light):
    code = """
import sys, torch, sparsegpt
layer = sparsegpt.prune_weight(torch.randn(4, 8), torch.eye(8), "2:4")
heavy = ["transformers", "datasets", "typer", "rich", "safetensors", "tokenizers", "huggingface_hub", "triton"]
print([name for name in heavy if name in sys.modules], int((layer.weight == 0).sum()))
"""
    assert forked_light.python("-c", code) == "[] 16\n"


def test_the_package_and_its_help_load_no_torch():
    code = """
import sys, sparsegpt
from sparsegpt.cli.commands import main
for words in (["--help"], ["run", "--help"], ["run", "--sparsity", "2:4", "--preset", "fats"]):
    sys.argv = ["sparsegpt", *words]
    try:
        main()
    except SystemExit as ended:
        print("code", ended.code)
print([name for name in ("torch", "numpy", "transformers", "huggingface_hub") if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=CHILD_ENVIRONMENT, cwd="/", check=True)
    assert ended.stdout.count("Usage:") == 2
    assert ended.stdout.splitlines()[-2:] == ["code 1", "[]"]
    assert "did you mean fast?" in ended.stderr


def test_every_module_imports_and_everything_public_is_there(forked):
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = f"""
import importlib, sparsegpt.kernels, sparsegpt.solvers
for name in {names}:
    importlib.import_module(name)
for package in (sparsegpt, sparsegpt.kernels, sparsegpt.solvers):
    for name in package.__all__:
        assert name in dir(package)
        getattr(package, name)
"""
    assert forked.python("-c", code) == ""


def test_no_top_level_package_takes_the_name_of_another():
    """A top-level `kernels` would shadow the package of this name that transformers imports."""
    code = "import importlib.util; print([n for n in ('kernels', 'eval', 'calib_data') if importlib.util.find_spec(n)])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CHILD_ENVIRONMENT, cwd="/", check=True
    )
    assert result.stdout == "[]\n"


def test_a_run_on_local_text_loads_no_datasets(forked, tmp_path):
    """With pandas behind it, that library takes 55 MB of private memory."""
    text = write_text(tmp_path / "text.txt")
    options = f"['run', '--sparsity', '2:4', '--calib', '{text}', '--eval', 'none', '--samples', '2', '--seqlen', '16']"
    code = f"""
import sys
from sparsegpt.cli.commands import app
app({options} + ['--out', '{tmp_path / "out"}', '--preset', 'paper', '--quiet'], standalone_mode=False)
print([name for name in ("datasets", "pandas", "pyarrow") if name in sys.modules])
"""
    assert forked.python("-c", code).splitlines()[-1] == "[]"
