"""Files and folders that are no model folder of transformers: what each is, told by names, and what to do with it.

Little is read: the first bytes of a file, and small JSON files. An answer is the end of a sentence that begins with the
file or the folder.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.beside import ADAPTER, WEIGHT_SUFFIXES, some
from sparsegpt.files.checked_json import read_json
from sparsegpt.files.model_files import CONFIG

# Weights that transformers loads into a causal language model.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER = (
    *("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*", "spm.model", "tekken.json"),
    *("*.tiktoken", "tokenization_*.py", "bpe.*", "*.spm"),
)
TEXTS = ("*.txt", "*.jsonl", "*.parquet")
_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.tbz2", "*.7z", "*.rar", "*.gz", "*.xz", "*.zst")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CACHED = "models--"
# Beside the weights of a checkpoint, where they are no sign of anything.
_OF_A_TRAINER = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
_POINTER = b"version https://git-lfs"
# Adapters of these kinds change no weights that could be merged.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
_EXPECTED = f"expected a model folder, with {CONFIG}, weights and a tokenizer as save_pretrained writes them"
_LANGUAGE_MODEL = "expected a causal language model; give the folder of one"


@dataclass(frozen=True)
class Kind:
    """A kind of folder. names: patterns of what lies in it, any of which tells. what: it is. advice: what to do."""

    what: str
    advice: str
    names: tuple[str, ...]


# Of other libraries, whatever else lies in the folder.
_LIBRARIES = (
    Kind("is a diffusers pipeline", _LANGUAGE_MODEL, ("model_index.json",)),
    Kind(
        "is a model of sentence-transformers, which makes vectors of texts",
        _LANGUAGE_MODEL,
        ("config_sentence_transformers.json", "sentence_bert_config.json"),
    ),
)
# Of folders without a configuration, or without weights that transformers loads; the first that fits.
_KINDS = (
    Kind(
        "holds GGUF weights, quantised for llama.cpp",
        "give the model that they were made from, or write one by transformers: from_pretrained(FOLDER, "
        "gguf_file=FILE), then save_pretrained",
        ("*.gguf", "*.ggml", "ggml-*.bin"),
    ),
    Kind(
        "holds weights in the form of their authors, not of transformers",
        "give the same model in transformers' form (its name often ends in -hf), or convert it by the script "
        "convert_..._weights_to_hf.py that transformers has for it",
        ("consolidated*", "params.json"),
    ),
    Kind(
        "holds weights in DeepSpeed's shards",
        "join them by the zero_to_fp32.py that lies beside them, or load them in the trainer and call save_pretrained",
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt", "*_model_states.pt", "mp_rank_*"),
    ),
    Kind(
        "holds weights in FSDP's shards",
        "join them by `accelerate merge-weights`, or load them in the trainer and call save_pretrained",
        ("*.distcp", "pytorch_model_fsdp*", ".metadata"),
    ),
    Kind(
        "holds weights of TensorFlow",
        "load them by transformers 4 with from_tf=True, then save_pretrained",
        ("*.h5", "saved_model.pb", "*.keras", "*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*"),
    ),
    Kind(
        "holds weights of Flax",
        "load them by transformers 4 with from_flax=True, then save_pretrained",
        ("*.msgpack",),
    ),
    Kind(
        "holds a model compiled for a runtime",
        "give the model that it was made from",
        ("*.onnx", "onnx", "*.tflite", "openvino_*", "*.mlpackage", "*.mlmodel", "*.engine", "*.plan", "*.ot"),
    ),
    Kind("holds an unfinished download", "fetch it again", ("*.incomplete", "*.part", "*.crdownload", "*.aria2")),
    Kind(
        "holds weights that a program has pickled",
        "load them into their class of transformers, then save_pretrained",
        ("*.pth", "*.pt", "*.ckpt", "*.bin", "*.npz"),
    ),
    Kind("is a data set", "expected a model folder; give texts for calibration", ("dataset_*.json", "*.arrow")),
)
_NO_MODEL = (
    Kind("holds a tokenizer alone", f"{_EXPECTED}; give the folder that has its model's weights too", TOKENIZER),
    Kind("holds texts alone", "expected a model folder; give texts for calibration", TEXTS),
)


def describe(path: Path) -> str | None:
    """What a file or folder is, and what to do; None for a folder that may be a model. OSError as the system has it."""
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that fit one of the patterns."""
    return [name for name in names if any(fnmatch(name.lower(), pattern) for pattern in patterns)]


def _describe_folder(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if path.name not in _OF_A_TRAINER)
    whole = CONFIG in names and bool(matching(names, WEIGHTS))
    if ADAPTER in names:
        return _of_adapter(folder / ADAPTER, beside_a_model=whole)
    if (found := _kind(names, _LIBRARIES)) and not _is_causal(folder):
        return found
    if whole:
        lfs = _pointer(folder)
        return lfs and f"has a pointer of Git LFS in place of {lfs}: run `git lfs pull` in it"
    if not names:
        return f"is empty: {_EXPECTED}"
    return _of_cache(folder, names) or _around_models(folder, names) or _kind(names, _KINDS) or _without_model(names)


def _of_adapter(path: Path, *, beside_a_model: bool) -> str:
    """What to do with an adapter, by its adapter_config.json, which names the base model too."""
    if beside_a_model:
        return f"has an adapter beside its own weights: merge it into them, or move {path.name} out of the folder"
    content: Any = {}
    with suppress(SparseGPTError):
        content = read_json(path)
    content = content if isinstance(content, dict) else {}
    kind, base = content.get("peft_type"), content.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    if kind in _PROMPTS:
        return f"is an adapter{of} ({kind}), which has nothing to merge: prune the model without it"
    called = "LoRA adapter" if kind in ("LORA", None) else f"adapter ({kind})"
    return (
        f"is a {called}{of}, no whole model: merge it first, by model.merge_and_unload().save_pretrained(FOLDER), and "
        "give that folder, with a tokenizer"
    )


def _pointer(folder: Path) -> str | None:
    """The first file of a folder in whose place there is a pointer of Git LFS."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and _start(path).startswith(_POINTER):
            return path.name
    return None


def _kind(names: Sequence[str], kinds: Iterable[Kind]) -> str | None:
    for kind in kinds:
        if found := matching(names, kind.names):
            return f"{kind.what} ({found[0]}): {kind.advice}"
    return None


def _without_model(names: Sequence[str]) -> str | None:
    return None if CONFIG in names or matching(names, WEIGHTS) else _kind(names, _NO_MODEL)


def _is_causal(folder: Path) -> bool:
    """Whether its configuration says that the weights are those of a causal language model."""
    with suppress(SparseGPTError, AttributeError, TypeError):
        return any("CausalLM" in str(name) for name in read_json(folder / CONFIG).get("architectures") or ())
    return False


def _of_cache(folder: Path, names: Sequence[str]) -> str | None:
    """Folders of the Hub's cache around a snapshot, which is what a model folder is there."""
    repository = folder.parent if folder.name == "snapshots" else folder
    if repository.name.startswith(_CACHED) and (folder != repository or "snapshots" in names or "blobs" in names):
        hub = repository.name.removeprefix(_CACHED).replace("--", "/", 1)
        snapshots = [path for path in repository.glob("snapshots/*") if path.is_dir()]
        if not snapshots:
            return f"belongs to the Hub's cache and holds no snapshot: give {hub}, which fetches the model"
        newest = max(snapshots, key=lambda path: (path.name == _main(repository), path.stat().st_mtime))
        return f"belongs to the Hub's cache: give {hub}, or the snapshot {newest}"
    if cached := [name for name in names if name.startswith(_CACHED)]:
        hubs = tuple(name.removeprefix(_CACHED).replace("--", "/", 1) for name in cached)
        return f"is the Hub's cache: give the name of a model in it, {some(hubs)}"
    return None


def _main(repository: Path) -> str:
    """The commit that the cache holds as main."""
    with suppress(OSError, ValueError):
        return (repository / "refs" / "main").read_text().strip()
    return ""


def _around_models(folder: Path, names: Sequence[str]) -> str | None:
    """A folder whose folders are models: a trainer's, or a collection."""
    numbers = {int(found[1]): name for name in names if (found := _CHECKPOINT.fullmatch(name))}
    if numbers:
        newest = folder / numbers[max(numbers)]
        return f"is a trainer's folder, of which each checkpoint is a model: give one of them, the newest is {newest}"
    models = tuple(name for name in names if _looks_like_a_model(folder / name))
    if models:
        return (
            f"is no model folder but holds some: give one of them, {some(tuple(str(folder / name) for name in models))}"
        )
    return None


def _looks_like_a_model(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with suppress(OSError):
        names = [path.name for path in folder.iterdir()]
        return ADAPTER in names or (CONFIG in names and bool(matching(names, WEIGHTS)))
    return False


def _describe_file(path: Path) -> str:
    name = path.name.lower()
    if _start(path).startswith(b"GGUF"):
        name += ".gguf"
    if name == CONFIG or matching([name], WEIGHTS) or name.endswith(".index.json"):
        return f"is a file of a model: give its folder, {path.parent}"
    if matching([name], _ARCHIVES):
        return "is an archive: unpack it and give the model folder inside"
    if matching([name], TEXTS):
        return "is a file of text: expected a model folder; give texts for calibration"
    if found := _kind([name], _KINDS):
        return found.replace("holds", "is a file of", 1).replace(f" ({name})", "", 1)
    if name.rpartition(".")[2] in WEIGHT_SUFFIXES:
        return f"is a file of weights: {_EXPECTED}"
    return f"is a file: {_EXPECTED}"


def _start(path: Path) -> bytes:
    with suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return file.read(len(_POINTER))
    return b""
