"""Models and tokenizers by short name, Hub id or folder, with one clear line for everything that can be wrong.

The arithmetic on a CPU is float32 even when the file holds halves (they are slow there and lose digits). At home every
tensor is what its file holds, in the file's own dtype, whatever the config says; so it is when the model is saved.
"""

import copy
import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsegpt.calib_data import bos_token, demo_folder
from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.beside import some
from sparsegpt.files.mapped import chunks, mapped_parameters
from sparsegpt.files.model_folder import check_folder
from sparsegpt.model.decoder import DecoderModel, position_limit
from sparsegpt.model.families import refuse_encoder
from sparsegpt.model.names import CheckpointNames, restore_dtypes
from sparsegpt.model.residence import Residence
from sparsegpt.model.source import Source, cached, fetched

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEMO = "demo"
MAX_DEFAULT_SEQUENCE = 2048

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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class LoadedModel:
    """A causal language model ready to prune.

    source: the folder that it comes from. stored_dtype: what the weights of its blocks are saved as. asked: the dtype
    that all floating-point tensors are saved as; None: each in that of its file. tied: whether the head was the
    embedding's own weight when it was loaded. residence: of a streamed model, whose weights stay in files; None when
    all of it is in memory. notes: what the user should know of it. content: sha256 of all weights, of a streamed model.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: Any
    source: Source
    stored_dtype: torch.dtype
    asked: torch.dtype | None = None
    tied: bool = False
    residence: Residence | None = None
    notes: tuple[str, ...] = ()
    content: str = ""

    @functools.cached_property
    def names(self) -> CheckpointNames:
        """What its tensors are called in the files."""
        return CheckpointNames.of(self.model, self.source.tensors)

    @functools.cached_property
    def decoder(self) -> DecoderModel:
        """The model as those who work on its blocks see it; SparseGPTError for one that is not known."""
        return DecoderModel.of(self.model)

    def bos_token(self, choice: str) -> int | None:
        """The token that calibration and evaluation windows begin with: choice "auto", "always" or "never"."""
        return bos_token(self.tokenizer, self.model.config.model_type, choice)

    def sequence_length(self, asked: int | None) -> int:
        """The length asked for, or the default; SparseGPTError when the model has no positions for it."""
        return sequence_length(self.name, self.model.config, asked)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream_through: Path | None = None,
) -> LoadedModel:
    """Load a model by short name ("opt-1.3b"), Hub id, folder, or "demo".

    dtype: "auto", "float32", "float16" or "bfloat16"; auto is the file's own on a GPU and float32 on a CPU.
    device: "auto", "cpu", "cuda", "cuda:1". revision: branch, tag or commit of a Hub model. trust_remote_code: run
    code that comes with the model. stream_through: leave the weights in their files, and bring each block to the
    device only while it computes; this folder takes what must be converted on the way.
    Raises SparseGPTError for anything that does not load whole.
    """
    from transformers import AutoTokenizer

    target = pick_device(device)
    located = _located(name, revision)
    try:
        folder = located if isinstance(located, Path) else fetched(located, revision)
        check_folder(folder)
        hub = {"trust_remote_code": trust_remote_code}
        config = _config(folder, trust_remote_code=trust_remote_code)
        source = Source.of(folder)
        stored, computing = dtypes_for(config, dtype, target, source.dtype)
        options = {"config": config, "dtype": stored if stream_through else computing, **hub}
        with mapped_parameters(stream_through) if stream_through else nullcontext():
            model, info = auto_class(config).from_pretrained(str(folder), output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **hub)
    except SparseGPTError:
        raise
    except Exception as error:
        raise _not_loaded(name, error) from error
    loaded = LoadedModel(name, model, tokenizer, source, stored, DTYPES.get(dtype), tied=is_tied(model))
    _check_loaded(name, model, tokenizer, info)
    if stream_through is None:
        _check_finite(name, model)
        model.to(target)
        return loaded
    working = {}
    if loaded.asked is None and getattr(config, "quantization_config", None) is None:
        working = restore_dtypes(loaded.names, source, model, (stored, computing), stream_through)
    loaded.content = _check_finite(name, model)
    loaded.notes = (*_surplus_note(loaded, info["unexpected_keys"]), *source.notes())
    if computing != stored:
        _compute_tables(model, stored, computing)
    loaded.residence = Residence(target, computing, stored, reversible=True, working=working)
    loaded.residence.attach(loaded.decoder, keep=_has_room(model, target))
    return loaded


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a model named as for `load_model`, whose folder is looked over before anything is read."""
    located = _located(name, revision)
    if isinstance(located, Path):
        check_folder(located)
    try:
        return _config(located, trust_remote_code=trust_remote_code, revision=revision)
    except SparseGPTError:
        raise
    except Exception as error:
        raise _not_loaded(name, error) from error


def stored_in_files(name: str, revision: str | None = None) -> torch.dtype | None:
    """What the blocks' weights of a model are stored as, from its files; None for one that is not on this machine."""
    located = _located(name, revision)
    folder = located if isinstance(located, Path) else cached(located, revision)
    try:
        return Source.of(folder).dtype if folder else None
    except SparseGPTError:
        if isinstance(located, Path):
            raise
        return None  # the cache holds the config alone


def _located(name: str, revision: str | None) -> Path | str:
    """The folder of a model, or its Hub id; SparseGPTError for what can be neither."""
    source = _source(name)
    if _is_folder(source):
        if revision is not None:
            raise SparseGPTError(f"--revision {revision} belongs to a Hub model, and {source} is a local folder")
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        found = "is a file" if Path(source).expanduser().is_file() else "does not exist"
        raise SparseGPTError(f"model folder {source} {found}: give a folder, a Hub id or one of the short names")
    return source


def _config(located: Path | str, *, trust_remote_code: bool, revision: str | None = None) -> "PretrainedConfig":
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        str(located), revision=revision or "main", trust_remote_code=trust_remote_code
    )
    return config


def without_weights(
    config: "PretrainedConfig", *, as_saved: bool = False, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The model of a configuration on the meta device; SparseGPTError for a configuration that makes none.

    as_saved: of the class that the configuration says was saved, in whose names its checkpoint is; where transformers
    does not know that class, as by default, of the one that `load_model` takes.
    """
    import transformers

    saved = getattr(transformers, (config.architectures or [""])[0], None) if as_saved else None
    code = {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = (
                saved._from_config(config) if saved else auto_class(config).from_config(config, **code)
            )
    except SparseGPTError:
        raise
    except Exception as error:
        raise _not_loaded(config.name_or_path, error) from error
    return model


def auto_class(config: "PretrainedConfig") -> Any:
    """transformers' loader for a configuration: of a causal language model, else of a multimodal model around one.

    Raises SparseGPTError for an encoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    refuse_encoder(config)

    def known(loader: Any) -> bool:
        """To transformers, or to the code that comes with the model."""
        return type(config) in loader._model_mapping or loader.__name__ in (getattr(config, "auto_map", None) or {})

    multimodal, causal = known(AutoModelForImageTextToText), known(AutoModelForCausalLM)
    if not multimodal and not causal:
        raise SparseGPTError(
            f"model type {config.model_type!r} has no causal language model in transformers, as encoders and models of "
            "other kinds have none: expected a decoder"
        )
    return AutoModelForImageTextToText if multimodal and not causal else AutoModelForCausalLM


def dtypes_for(
    config: "PretrainedConfig", dtype: str, device: torch.device, found: torch.dtype | None = None
) -> tuple[torch.dtype, torch.dtype]:
    """(stored, computing): an explicit dtype is both; else the files' own, and float32 to compute in on a CPU.

    found: what the files hold; where nobody knows, or where they hold packed weights, the config must tell.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise SparseGPTError(f"dtype {dtype!r} is not known: expected auto, {', '.join(DTYPES)}")
    said = getattr(config, "dtype", None)
    packed = getattr(config, "quantization_config", None) is not None
    stored = DTYPES.get(dtype) or (said if packed else None) or found or said or torch.float32
    return stored, DTYPES.get(dtype) or (stored if device.type == "cuda" else torch.float32)


def sequence_length(name: str, config: "PretrainedConfig", asked: int | None) -> int:
    """The length asked for, else min(2048, the model's limit); SparseGPTError when there are no positions for it."""
    limit = position_limit(config)
    if asked is not None and limit is not None and asked > limit:
        raise SparseGPTError(f"model {name!r} has {limit} positions: --seqlen {asked} is too long")
    return asked if asked is not None else min(MAX_DEFAULT_SEQUENCE, limit or MAX_DEFAULT_SEQUENCE)


def source_folders(name: str) -> tuple[Path, ...]:
    """The folder that a model is read from, if it is one of this machine's."""
    folder = Path(_source(name)).expanduser()
    try:
        return (folder,) if folder.is_dir() else ()
    except OSError:  # who may not look at it is told so when it is read
        return ()


def _source(name: str) -> str:
    return str(demo_folder()) if name == DEMO else SHORT_NAMES.get(name.lower(), name)


def _not_loaded(name: str, error: Exception) -> SparseGPTError:
    """One line for whatever transformers, safetensors and the Hub client raise: a dozen unrelated types."""
    advice = _advice(_source(name), str(error))
    return SparseGPTError(f"model {name!r} could not be loaded: {first_line(error)}{advice}")


def _compute_tables(model: "PreTrainedModel", stored: torch.dtype, computing: torch.dtype) -> None:
    """Give tables that are in no checkpoint, such as Gemma's embedding scale, the digits of the computing dtype.

    The model has computed them in the dtype of its file; a second one without weights does so in the other.
    """
    tables = {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if (table := module._buffers[name]) is not None and table.dtype == stored
    }
    if not tables:
        return

    def weigh_nothing(module: nn.Module, name: str, parameter: Any) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"))

    handle = register_module_parameter_registration_hook(weigh_nothing)
    try:
        weightless = type(model)._from_config(copy.deepcopy(model.config), dtype=computing)
    finally:
        handle.remove()
    for path, (module, name) in tables.items():
        module._buffers[name] = weightless.get_buffer(path)


def _has_room(model: "PreTrainedModel", device: torch.device) -> bool:
    """Whether a GPU takes the whole model in half of its free memory, so that nothing need be brought twice."""
    if device.type != "cuda":
        return False
    needed: int = sum(parameter.nbytes for parameter in model.parameters())
    return needed < int(torch.cuda.mem_get_info(device)[0]) / 2


def pick_device(device: str) -> torch.device:
    """The device named, or a GPU when there is one for "auto"."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SparseGPTError(f"device {device!r} is not known: expected auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise SparseGPTError(f"device {device!r} is not supported: expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SparseGPTError(f"device {device!r} was asked for, but torch finds no CUDA device: use --device cpu")
    return found


def _check_loaded(name: str, model: "PreTrainedModel", tokenizer: Any, info: dict[str, Any]) -> None:
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise SparseGPTError(
            f"model {name!r} lacks {len(missing)} of its tensors, {missing[0]} first: "
            "its weights do not belong to its config"
        )
    if surplus := _left_out(model, info["unexpected_keys"]):
        raise SparseGPTError(f"model {name!r}: its config has no place for {surplus}, which its weights hold")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SparseGPTError(
            f"model {name!r}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows; "
            "they do not belong together"
        )


def _check_finite(name: str, model: "PreTrainedModel") -> str:
    """Look at every weight once; returns the sha256 of all of them, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in chunks(tensor.detach()):
            if isinstance(tensor, nn.Parameter) and not torch.isfinite(part).all():
                raise SparseGPTError(
                    f"model {name!r}: {key} contains NaN or infinite values; the checkpoint is damaged"
                )
            raw: Any = part.contiguous().view(torch.uint8).cpu().numpy()
            digest.update(raw)
    return digest.hexdigest()


def _surplus_note(loaded: LoadedModel, unexpected: Iterable[str]) -> Iterator[str]:
    """Of tensors that are carried over as they are. Tables that loaders compute themselves need no mention."""
    told = set(unexpected)
    prefix = f"{loaded.model.base_model_prefix}."
    surplus = tuple(
        name
        for name in loaded.names.surplus
        if name.endswith(".weight") or told & {name, prefix + name, name.removeprefix(prefix)}
    )
    if surplus:
        count = "1 tensor" if len(surplus) == 1 else f"{len(surplus)} tensors"
        yield f"{count} without a place in {type(loaded.model).__name__} carried over as in the files: {some(surplus)}"


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the head's weight is the embedding's own."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _left_out(model: "PreTrainedModel", unexpected: Iterable[str]) -> str | None:
    """The first tensor of a block, or expert, after the last one that the configuration speaks of."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    surplus = tuple(f"{path}.{len(blocks)}." for path, blocks in lists.items())
    for key in sorted(unexpected):
        if key.startswith(surplus) or f"{model.base_model_prefix}.{key}".startswith(surplus):
            return key
    return None


def _is_folder(source: str) -> bool:
    try:
        return Path(source).is_dir()
    except OSError as error:
        raise SparseGPTError(f"model folder {source} cannot be read: {first_line(error)}") from error


def _advice(source: str, said: str) -> str:
    if "trust_remote_code" in said:
        return "; read it, and give --trust-remote-code if you trust it"
    if _is_folder(source):
        return ""
    return f"; {source} is no local folder: without network give a folder, or --model demo"
