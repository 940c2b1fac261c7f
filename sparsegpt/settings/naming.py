"""What a user may call a model: the demo, a short name, a folder, or else a model on the Hub."""

from pathlib import Path

from sparsegpt.calib_data import demo_folder
from sparsegpt.errors import SparseGPTError, did_you_mean, first_line, nearest
from sparsegpt.incoming.kinds import describe

DEMO = "demo"
# The names of the papers' tables. Anything else is taken as a folder or a Hub id.
SHORT_NAMES = {
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")},
    **{f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
    **{f"llama-3-{size}": f"meta-llama/Meta-Llama-3-{size.upper()}" for size in ("8b", "70b")},
    **{f"llama-3.2-{size}": f"meta-llama/Llama-3.2-{size.upper()}" for size in ("1b", "3b")},
    **{f"smollm2-{size}": f"HuggingFaceTB/SmolLM2-{size.upper()}" for size in ("135m", "360m", "1.7b")},
    **{f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")},
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
}
# A name this like a short name is a slip of it, and not worth a question to the Hub.
SLIP = 0.75
_HUB = ("huggingface.co/", "hf.co/", "www.huggingface.co/")
_EXPECTED = "expected a folder, a Hub id or one of the short names"


def find_model(name: str, revision: str | None = None) -> Path | str:
    """The folder that a model's name means on this machine, or its Hub id, before anything is read or asked.

    Raises SparseGPTError for a file, a web address, a path that leads nowhere, a slip of a short name, and a revision
    of a local folder.
    """
    source = SHORT_NAMES.get(name.lower(), name)
    folder = local_path(name)
    if not name.strip():
        raise SparseGPTError(f"model {name!r} has no name: {_EXPECTED}", settings=("model",))
    if folder is not None and _exists(folder):
        if not folder.is_dir():
            raise SparseGPTError(f"model {folder} {describe(folder)}")
        if revision is not None:
            raise SparseGPTError(
                f"revision {revision} belongs to a Hub model, and {folder} is a local folder: leave it out",
                settings=("revision",),
            )
        return folder
    if "://" in name or name.startswith(_HUB):
        raise SparseGPTError(f"model {name} is a web address: {_of_address(name)}")
    if folder is None or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise SparseGPTError(f"model folder {name} does not exist: {_EXPECTED}{_near_path(folder)}")
    if "/" not in source and (meant := nearest(source, (*SHORT_NAMES, DEMO), SLIP)):
        raise SparseGPTError(f"model {name!r} is no short name and no folder here: {_EXPECTED}; did you mean {meant}?")
    return source


def local_path(name: str) -> Path | None:
    """Where a model of this name lies or would lie on this machine; None for no name, or the home of nobody here."""
    if name == DEMO:
        return demo_folder()
    if not name.strip():
        return None
    try:
        return Path(SHORT_NAMES.get(name.lower(), name)).expanduser()
    except RuntimeError:
        return None


def suggestion(name: str) -> str:
    """A question that ends a message about a model that could not be had: the nearest Hub id we know, or folder."""
    known = SHORT_NAMES.values()
    if name.lower() in SHORT_NAMES or name in known:
        return ""
    return did_you_mean(name, known, SLIP) or _near_path(local_path(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise SparseGPTError(f"model folder {path} cannot be read: {first_line(error)}") from error


def _near_path(path: Path | None) -> str:
    """A question for what lies where this path leads, by a name like its own."""
    if path is None or not path.name:
        return ""
    try:
        there = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        first = next((parent for parent in path.parents if parent.is_dir()), None)
        return (
            "" if first is None or first == Path() else f"; {first} is there, {path.relative_to(first).parts[0]} is not"
        )
    near = nearest(path.name, there, SLIP)
    return f"; did you mean {path.with_name(near)}?" if near else ""


def _of_address(address: str) -> str:
    """What to do with a web address."""
    path = address.removeprefix("hf://").partition("://")[2] or address.removeprefix("hf://")
    for place in _HUB if "hf://" not in address else ("",):
        found = path.removeprefix(place).split("/")
        if path.startswith(place) and len(found) >= 2 and all(found[:2]):
            return f"give the Hub id {found[0]}/{found[1].split('?')[0]}"
    return "fetch the model and give its folder, or give a Hub id"
