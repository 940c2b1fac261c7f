"""Models and tokenizers by short name, Hub id or folder, with one clear line for everything that can be wrong.

The arithmetic on a CPU is float32 even when the file holds halves (they are slow there and lose digits); a saved
model goes back to the dtype of the file that it came from.
"""

import copy
import functools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsegpt.calib_data import demo_folder
from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.mapped import chunks, mapped_parameters
from sparsegpt.model.decoder import DecoderModel, position_limit
from sparsegpt.model.model_folder import check_folder
from sparsegpt.model.residence import Residence

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

    stored_dtype: what its weights are saved as. residence: of a streamed model, whose weights stay in files; None when
    all of it is in memory.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: Any
    stored_dtype: torch.dtype
    residence: Residence | None = None

    @functools.cached_property
    def decoder(self) -> DecoderModel:
        """The model as those who work on its blocks see it; SparseGPTError for one that is not known."""
        return DecoderModel.of(self.model)

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
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    stored, computing = dtypes_for(config, dtype, target)
    source, hub = _source(name), {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        with mapped_parameters(stream_through) if stream_through else nullcontext():
            model, info = auto_class(config).from_pretrained(
                source, config=config, dtype=stored if stream_through else computing, output_loading_info=True, **hub
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except SparseGPTError:
        raise
    except Exception as error:
        raise _not_loaded(name, error) from error
    _check_loaded(name, model, tokenizer, info)
    if stream_through is None:
        return LoadedModel(name, model.to(target), tokenizer, stored)
    if computing != stored:
        _compute_tables(model, stored, computing)
    residence = Residence(target, computing, stored, reversible=True)
    loaded = LoadedModel(name, model, tokenizer, stored, residence)
    residence.attach(loaded.decoder, keep=_has_room(model, target))
    return loaded


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a model named as for `load_model`, whose folder is looked over before anything is read."""
    from transformers import AutoConfig

    source = _source(name)
    if _is_folder(source):
        check_folder(Path(source))
        if revision is not None:
            raise SparseGPTError(f"--revision {revision} belongs to a Hub model, and {source} is a local folder")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        found = "is a file" if Path(source).expanduser().is_file() else "does not exist"
        raise SparseGPTError(f"model folder {source} {found}: give a folder, a Hub id or one of the short names")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _not_loaded(name, error) from error
    return config


def without_weights(config: "PretrainedConfig", *, as_saved: bool = False) -> "PreTrainedModel":
    """The model of a configuration on the meta device; SparseGPTError for a configuration that makes none.

    as_saved: of the class that the configuration says was saved, in whose names its checkpoint is; where transformers
    does not know that class, as by default, of the one that `load_model` takes.
    """
    import transformers

    saved = getattr(transformers, (config.architectures or [""])[0], None) if as_saved else None
    try:
        with torch.device("meta"):
            model: PreTrainedModel = saved._from_config(config) if saved else auto_class(config).from_config(config)
    except Exception as error:
        raise _not_loaded(config.name_or_path, error) from error
    return model


def auto_class(config: "PretrainedConfig") -> Any:
    """transformers' loader for a configuration: of a causal language model, else of a multimodal model around one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if multimodal and not causal else AutoModelForCausalLM


def dtypes_for(config: "PretrainedConfig", dtype: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(stored, computing): an explicit dtype is both; else the file's own, and float32 to compute in on a CPU."""
    if dtype != "auto" and dtype not in DTYPES:
        raise SparseGPTError(f"dtype {dtype!r} is not known: expected auto, {', '.join(DTYPES)}")
    stored = DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
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
    return (folder,) if folder.is_dir() else ()


def _source(name: str) -> str:
    return str(demo_folder()) if name == DEMO else SHORT_NAMES.get(name.lower(), name)


def _not_loaded(name: str, error: Exception) -> SparseGPTError:
    """One line for whatever transformers, safetensors and the Hub client raise: a dozen unrelated types."""
    return SparseGPTError(f"model {name!r} could not be loaded: {first_line(error)}{_advice(_source(name))}")


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
    for key, parameter in model.named_parameters():
        if not all(torch.isfinite(part).all() for part in chunks(parameter)):
            raise SparseGPTError(f"model {name!r}: {key} contains NaN or infinite values; the checkpoint is damaged")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SparseGPTError(
            f"model {name!r}: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows; "
            "they do not belong together"
        )


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


def _advice(source: str) -> str:
    if _is_folder(source):
        return ""
    return f"; {source} is no local folder: without network give a folder, or --model demo"
