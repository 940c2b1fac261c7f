"""Models and tokenizers by short name, Hub id or folder, with one clear line for everything that can be wrong.

The arithmetic on a CPU is float32 even when the file holds halves (they are slow there and lose digits). At home every
tensor is what its file holds, in the file's own dtype, whatever the config says; so it is when the model is saved.
"""

import copy
import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsegpt.calib_data import bos_token
from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.beside import some
from sparsegpt.files.mapped import chunks, mapped_parameters
from sparsegpt.files.model_files import CONFIG
from sparsegpt.incoming.dequantise import Made, can_read, read_as_plain
from sparsegpt.incoming.hub import ask_hub, hub_reason
from sparsegpt.incoming.model_folder import check_folder, check_tokenizer, look_over, no_tokenizer
from sparsegpt.incoming.quantised import method_by_tensors, method_of, refusal
from sparsegpt.model.decoder import DecoderModel, position_limit
from sparsegpt.model.families import refuse_encoder
from sparsegpt.model.names import CheckpointNames, restore_dtypes
from sparsegpt.model.residence import Residence
from sparsegpt.model.source import Source, cached, fetched, hub_id, stored_types
from sparsegpt.settings.machine import parse_dtype, pick_device
from sparsegpt.settings.naming import find_model, local_path, suggestion

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MAX_DEFAULT_SEQUENCE = 2048
# A tokenizer of fewer tokens may be one without a vocabulary.
FEW_TOKENS = 256
# Letters of a library's message that are quoted.
MESSAGE = 300


@dataclass
class LoadedModel:
    """A causal language model ready to prune.

    source: the folder that it comes from. stored_dtype: what the weights of its blocks are saved as. asked: the dtype
    that all floating-point tensors are saved as; None: each in that of its file. tied: whether the head was the
    embedding's own weight when it was loaded. residence: of a streamed model, whose weights stay in files; None when
    all of it is in memory. notes: what the user should know of it. content: sha256 of all weights, of a streamed model.
    made: where its weights were made plain, a folder that goes with the model.
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
    made: Made | None = None

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
    to_prune: bool = False,
) -> LoadedModel:
    """Load a model by short name ("opt-1.3b"), Hub id, folder, or "demo".

    dtype: "auto", "float32", "float16" or "bfloat16"; auto is the file's own on a GPU and float32 on a CPU.
    device: "auto", "cpu", "cuda", "cuda:1". revision: branch, tag or commit of a Hub model. trust_remote_code: run
    code that comes with the model. stream_through: leave the weights in their files, and bring each block to the
    device only while it computes; this folder takes what must be converted on the way. to_prune: integers that can be
    read are made plain first, and other packed or quantised weights are refused.
    Raises SparseGPTError for anything that does not load whole.
    """
    target, asked = pick_device(device), parse_dtype(dtype)
    located = find_model(name, revision)
    hub = {"trust_remote_code": trust_remote_code}
    with one_line(name, revision):
        folder = located if isinstance(located, Path) else _fetched(located, revision)
        check_folder(folder)
        config = _config(folder, trust_remote_code=trust_remote_code)
        made: Made | None = None
        notes: tuple[str, ...] = ()
        if to_prune:
            _check_plain(name, config, folder)
            if can_read(config.to_dict()):
                made = Made(stream_through)
                folder, notes = _made_plain(folder, made.path)
                config = _config(folder, trust_remote_code=trust_remote_code)
        tokenizer = _tokenizer(name, folder, hub)
        source = Source.of(folder)
        stored, computing = dtypes_for(config, dtype, target, source.dtype)
        options = {"config": config, "dtype": stored if stream_through else computing, **hub}
        with mapped_parameters(stream_through) if stream_through else nullcontext():
            model, info = auto_class(config).from_pretrained(str(folder), output_loading_info=True, **options)
    loaded = LoadedModel(name, model, tokenizer, source, stored, asked, tied=is_tied(model), notes=notes, made=made)
    _check_loaded(name, model, tokenizer, info)
    if stream_through is None:
        with source.files.meanwhile():
            _check_finite(name, model)
            model.to(target)
        return loaded
    working = {}
    if loaded.asked is None and getattr(config, "quantization_config", None) is None:
        working = restore_dtypes(loaded.names, source, model, (stored, computing), stream_through)
    with source.files.meanwhile():
        loaded.content = _check_finite(name, model)
    loaded.notes = (*notes, *_surplus_note(loaded, info["unexpected_keys"]), *source.notes())
    if computing != stored:
        _compute_tables(model, stored, computing)
    loaded.residence = Residence(target, computing, stored, reversible=True, working=working, files=source.files)
    loaded.residence.attach(loaded.decoder, keep=_has_room(model, target))
    return loaded


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, to_prune: bool = False
) -> "PretrainedConfig":
    """The configuration of a model named as for `load_model`, whose folder is looked over before anything is read.

    to_prune: packed and quantised weights are refused, as far as they are on this machine or the configuration tells,
    unless they can be read.
    """
    located = find_model(name, revision)
    if isinstance(located, Path):
        check_folder(located)
    with one_line(name, revision):
        config = _config(located, trust_remote_code=trust_remote_code, revision=revision)
        if to_prune:
            _check_plain(name, config, located)
    return config


def stored_in_files(name: str, revision: str | None = None) -> torch.dtype | None:
    """What the blocks' weights of a model are stored as, from its files; None for one that is not on this machine."""
    located = find_model(name, revision)
    folder = located if isinstance(located, Path) else cached(located, revision)
    try:
        return Source.of(folder).dtype if folder else None
    except SparseGPTError:
        if isinstance(located, Path):
            raise
        return None  # the cache holds the config alone


def check_model(name: str, revision: str | None = None) -> None:
    """Look whether a name can be a model to prune or to score: of a local one the folder and its tokenizer's files.

    Nothing is asked of the Hub. Raises SparseGPTError.
    """
    found = find_model(name, revision)
    if isinstance(found, Path):
        check_folder(found)
        check_tokenizer(name, found)


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model named as for `load_model`, fetched from the Hub where it is there; nothing is loaded.

    Raises SparseGPTError for a model that is not to be had, and for folders of another kind.
    """
    found = find_model(name, revision)
    with one_line(name, revision):
        folder = found if isinstance(found, Path) else _fetched(found, revision)
    look_over(folder)
    return folder


def _fetched(hub: str, revision: str | None) -> Path:
    if cached(hub, revision) is None:
        ask_hub(hub, CONFIG, revision)
    return fetched(hub, revision)


def _made_plain(folder: Path, place: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with plain weights, written inside `place` under the model's own name, and what to tell of it."""
    target = place / (hub_id(folder) or folder.absolute().name).rpartition("/")[2]
    target.mkdir()
    return target, (read_as_plain(folder, target),)


def _check_plain(name: str, config: "PretrainedConfig", located: Path | str) -> None:
    """Refuse packed and quantised weights, by the configuration and by the headers of a folder's files.

    Integers that can be read are not refused. Raises SparseGPTError, naming the method.
    """
    if can_read(config.to_dict()):
        return
    method = method_of(config.to_dict())
    if method is None and isinstance(located, Path):
        method = method_by_tensors(stored_types(located))
    if method is not None:
        raise SparseGPTError(refusal(name, method))


def _config(located: Path | str, *, trust_remote_code: bool, revision: str | None = None) -> "PretrainedConfig":
    from transformers import AutoConfig

    if isinstance(located, str) and cached(located, revision) is None:
        ask_hub(located, CONFIG, revision)
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
    with one_line(config.name_or_path), torch.device("meta"):
        model: PreTrainedModel = saved._from_config(config) if saved else auto_class(config).from_config(config, **code)
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
    asked = parse_dtype(dtype)
    said = getattr(config, "dtype", None)
    packed = getattr(config, "quantization_config", None) is not None
    stored = asked or (said if packed else None) or found or said or torch.float32
    return stored, asked or (stored if device.type == "cuda" else torch.float32)


def sequence_length(name: str, config: "PretrainedConfig", asked: int | None) -> int:
    """The length asked for, else min(2048, the model's limit); SparseGPTError when there are no positions for it."""
    limit = position_limit(config)
    if asked is not None and limit is not None and asked > limit:
        raise SparseGPTError(
            f"model {name!r} has {limit} positions: a sequence length of {asked} is too long",
            settings=("sequence_length",),
        )
    return asked if asked is not None else min(MAX_DEFAULT_SEQUENCE, limit or MAX_DEFAULT_SEQUENCE)


def source_folders(name: str) -> tuple[Path, ...]:
    """The folder that a model is read from, if it is one of this machine's."""
    folder = local_path(name)
    try:
        return (folder,) if folder is not None and folder.is_dir() else ()
    except OSError:  # a name too long
        return ()


def _tokenizer(name: str, folder: Path, options: dict[str, Any]) -> Any:
    """Some classes make one without any word where they find no files."""
    from transformers import AutoTokenizer

    check_tokenizer(name, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise
        said = " ".join([f"{type(error).__name__}:", *str(error).split()])
        raise SparseGPTError(f"the tokenizer of model {name!r} could not be loaded: {said[:MESSAGE]}") from error
    if len(tokenizer) < FEW_TOKENS and not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise no_tokenizer(name, folder)
    return tokenizer


@contextmanager
def one_line(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn whatever transformers, safetensors and the Hub client raise, a dozen unrelated types, into one line."""
    try:
        yield
    except SparseGPTError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise SparseGPTError(
                f"model {name!r} brings code of its own, which is not run unasked: read it, allow it if you trust it",
                settings=("trust_remote_code",),
            ) from error
        if source_folders(name):
            raise SparseGPTError(f"model {name!r} could not be loaded: {first_line(error)}") from error
        reason = hub_reason(error, CONFIG, revision) or first_line(error)
        raise SparseGPTError(
            f"model {name!r} is no local folder and could not be had from the Hub: {reason}; without network give a "
            f"folder, or demo{suggestion(name)}",
            settings=("model",),
        ) from error


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
