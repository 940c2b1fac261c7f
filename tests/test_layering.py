"""One direction, no circles: a file imports only from lower floors, and the solvers need nothing but torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .support import CHILD_ENVIRONMENT, write_text

ROOT = Path(__file__).parents[1]
FOLDERS = {"sparsegpt": "sparsegpt", "kernels": "sparsegpt.kernels", "eval": "sparsegpt.eval"}
FOLDERS["calib_data"] = "sparsegpt.calib_data"

FLOORS = {
    "errors": 0,
    "factor": 0,
    "strips": 0,
    "sparsity": 0,
    "experts": 1,
    "masks": 1,
    "hessian": 1,
    "solvers": 2,
    "allocation": 3,
    "block_job": 3,
    "blocks": 3,
    "capture": 3,
    "choices": 3,
    "recipe": 3,
    "selection": 3,
    "settings": 3,
    "checkpoint": 3,
    "folders": 0,
    "groups": 3,
    "model_folder": 3,
    "mapped": 3,
    "residence": 3,
    "streams": 3,
    "models": 3,
    "head": 3,
    "reconstruct": 3,
    "distill": 3,
    "progress": 3,
    "training": 3,
    "reports": 3,
    "stages": 3,
    "unfuse": 3,
    "calib_data": 3,
    "": 4,  # sparsegpt/__init__.py: tells transformers of packed folders; the rest above 2 waits for its first use
    "pipeline": 4,
    "plan": 4,
    "private_memory": 0,
    "kernels": 4,
    "eval": 4,
    "inspection": 5,
    "export": 5,
    "work": 5,
    "run": 5,
    "run_options": 5,
    "console": 5,
    "cli": 6,
    "cli_bench": 6,
    "cli_options": 6,
    "__main__": 6,
}
# Files of one floor may use one another (head uses capture, console shows what run tells) as long as no circle arises.
LIGHT = {"torch", "einops", "sparsegpt"} | set(sys.stdlib_module_names)
# The fused kernel is loaded only for tensors on a GPU, as the test of loaded modules below shows.
LIGHT_EXCEPTIONS = {"sparsegpt.solvers.fused": {"triton"}}
KERNELS_MAY_USE = {"errors", "experts", "folders", "sparsity", "masks", "hessian"}


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


def imports(name: str, *, everywhere: bool = True) -> set[str]:
    """Absolute names that a module imports; at its top alone, or anywhere. Type checking does not count."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
    """ "sparsegpt.solvers.admm" -> "solvers"."""
    return name.removeprefix("sparsegpt").strip(".").split(".")[0]


def inner_imports(name: str, **options: bool) -> set[str]:
    return {found for found in imports(name, **options) if found == "sparsegpt" or found.startswith("sparsegpt.")}


@pytest.mark.parametrize("name", MODULES)
def test_every_file_has_a_floor(name):
    assert room(name) in FLOORS


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_to_lower_floors(name):
    for target in inner_imports(name) - {name}:
        assert FLOORS[room(target)] <= FLOORS[room(name)], f"{name} imports {target}"


def test_imports_run_in_no_circle():
    graph = {name: inner_imports(name, everywhere=False) & MODULES.keys() - {name} for name in MODULES}
    settled: set[str] = set()
    while ready := {name for name in graph if name not in settled and graph[name] <= settled}:
        settled |= ready
    assert not graph.keys() - settled


@pytest.mark.parametrize("name", [name for name in MODULES if FLOORS.get(room(name), 9) <= 2 or name == "sparsegpt"])
def test_the_lower_floors_import_torch_and_einops_alone(name):
    tops = {found.split(".")[0] for found in imports(name)}
    assert tops <= LIGHT | LIGHT_EXCEPTIONS.get(name, set())


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "kernels"])
def test_kernels_use_nothing_of_the_engine_above_the_first_floor(name):
    assert {room(target) for target in inner_imports(name)} <= KERNELS_MAY_USE | {"kernels"}


@pytest.mark.parametrize("name", [name for name in MODULES if FLOORS.get(room(name), 9) < 5])
def test_only_the_top_prints_or_exits(name):
    """print in a script's main, behind `if __name__`, is that script's own top."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
        return
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "exit", "sys.exit", "quit", "warnings.warn"}


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CHILD_ENVIRONMENT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_pruning_one_layer_loads_no_transformers():
    code = """
import sys, torch, sparsegpt
layer = sparsegpt.prune_weight(torch.randn(4, 8), torch.eye(8), "2:4")
heavy = ["transformers", "datasets", "typer", "rich", "safetensors", "tokenizers", "huggingface_hub", "triton"]
print([name for name in heavy if name in sys.modules], int((layer.weight == 0).sum()))
"""
    assert python(code) == "[] 16\n"


def test_every_module_imports_and_everything_public_is_there():
    names = [name for name in MODULES if not name.endswith("__main__")]
    python(f"""
import importlib, sparsegpt
for name in {names}:
    importlib.import_module(name)
for name in sparsegpt.__all__:
    getattr(sparsegpt, name)
""")


def test_no_top_level_package_takes_the_name_of_another():
    """A top-level `kernels` would shadow the package of this name that transformers imports."""
    code = "import importlib.util; print([n for n in ('kernels', 'eval', 'calib_data') if importlib.util.find_spec(n)])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CHILD_ENVIRONMENT, cwd="/", check=True
    )
    assert result.stdout == "[]\n"


def test_a_run_on_local_text_loads_no_datasets(tmp_path):
    """With pandas behind it, that library takes 55 MB of private memory."""
    text = write_text(tmp_path / "text.txt")
    options = f"['run', '--sparsity', '2:4', '--calib', '{text}', '--eval', 'none', '--samples', '2', '--seqlen', '16']"
    code = f"""
import sys
from sparsegpt.cli import app
app({options} + ['--out', '{tmp_path / "out"}', '--preset', 'paper', '--quiet'], standalone_mode=False)
print([name for name in ("datasets", "pandas", "pyarrow") if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"
