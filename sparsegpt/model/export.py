"""A model written as the folder that it came from, with other weights: what pruning has not changed stays as it was.

Weights go out one block at a time, under the names and in the dtypes of the source's files. Everything else is the
source's own, byte for byte, but for the entries of config.json that are no longer true.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt.files.headers import check_storable
from sparsegpt.files.model_files import CONFIG
from sparsegpt.files.tensor_files import ShardedWriter, header_room
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.loading import LoadedModel, is_tied
from sparsegpt.model.names import natural
from sparsegpt.model.source import FILE_KEY

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers since 4.56, and before


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """Write weights and everything that lay beside them into a folder; memory is needed for one block."""
    write_beside(loaded, folder)
    write_weights(loaded, folder)


def write_beside(loaded: LoadedModel, folder: Path) -> None:
    """Write everything but the weights; OSError as the system raises it."""
    loaded.source.beside.copy_to(folder, but=frozenset({CONFIG}))
    write_config(loaded, folder)


def write_config(loaded: LoadedModel, folder: Path) -> None:
    """Write config.json as it is true of the model now."""
    (folder / CONFIG).write_bytes(_config(loaded))


def write_weights(loaded: LoadedModel, folder: Path) -> None:
    """Write the weights alone."""
    names = _TensorNames(loaded)
    with loaded.source.files.meanwhile(), ShardedWriter(folder, header_room(names.written)) as writer:
        for part in _parts(loaded.decoder):
            for name, tensor in names.of_part(part):
                writer.add((name, tensor))
        for name, tensor in loaded.source.read(names.carried):
            writer.add((name, tensor))


def check_names(loaded: LoadedModel) -> None:
    """That every tensor can be written under the name, in the shape and dtype of its file; SparseGPTError where not."""
    loaded.names.check(loaded.model, {name: tensor.shape for name, tensor in loaded.source.tensors.items()})
    for name, tensor in loaded.source.tensors.items():
        check_storable(name, tensor.dtype)


class _TensorNames:
    """What the tensors of a model are called in the folder to be written.

    Those of the source's files keep their names. `new`: parameters that the files lack, such as a head that has parted
    from the embedding, by their names in the model. `carried`: buffers and tensors without a place in the model, which
    nobody has changed: they come from the files.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.names = loaded, loaded.names
        model, asked = loaded.model, loaded.asked
        state = model.state_dict(keep_vars=True)
        parameters = {name for name, tensor in state.items() if isinstance(tensor, torch.nn.Parameter)}
        known = self.names.same.keys() | self.names.joined.keys()
        kept = {id(state[name]) for name in known if name in state}
        self.new: dict[str, str] = {}
        for name in state:
            if name in parameters - known and id(state[name]) not in kept:
                kept.add(id(state[name]))
                self.new[name] = self.names.new_name(model, name)
        buffers = [name for target, name in self.names.same.items() if target not in parameters and asked is None]
        self.carried = [*buffers, *self.names.surplus]
        self.written = [*loaded.source.tensors, *self.new.values()]

    def of_part(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The names and tensors to be written of a part of the model."""
        carried = set(self.carried)
        for name in sorted(tensors, key=natural):
            stored = self.names.same.get(name)
            if stored is not None and stored not in carried:
                yield stored, self._as_stored(tensors[name], stored)
            elif name in self.new:
                yield self.new[name], self._as_stored(tensors[name])
        joined = {name: tensor for name, tensor in tensors.items() if name in self.names.joined}
        for name, tensor in self.names.part(self.loaded.model, joined).items():
            yield name, self._as_stored(tensor, name)

    def _as_stored(self, tensor: Tensor, name: str | None = None) -> Tensor:
        """In the dtype of the tensor of this name in the files, unless another was asked for."""
        loaded = self.loaded
        if name is not None and loaded.asked is None:
            return tensor.to(loaded.source.tensors[name].dtype)
        at_work = loaded.residence is None and tensor.dtype == loaded.model.dtype
        return tensor.to(loaded.stored_dtype) if at_work else tensor


def _parts(decoder: DecoderModel) -> Iterator[dict[str, Tensor]]:
    """The model's tensors by their names, first those outside of the blocks, then block by block."""
    inside = f"{decoder.family.blocks}."
    yield {name: tensor for name, tensor in decoder.model.state_dict().items() if not name.startswith(inside)}
    for prefix, block in decoder.by_prefix():
        yield block.state_dict(prefix=prefix)


def _config(loaded: LoadedModel) -> bytes:
    """config.json of the source, with what is no longer true of it changed; to the byte as it was if nothing is."""
    source = loaded.source
    config = {**copy.deepcopy(source.config), **loaded.changes}
    config.pop(FILE_KEY, None)  # the files have the usual names now
    weights = source.tensors.keys() - set(_TensorNames(loaded).carried)
    dtypes = {source.tensors[name].dtype for name in weights} if loaded.asked is None else {loaded.asked}
    _say_dtype(config, loaded.stored_dtype, dtypes)
    if loaded.tied and not is_tied(loaded.model):
        config["tie_word_embeddings"] = False
        for part in _parts_of(config):
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return source.config_file if config == source.config else _in_the_form_of(source.config_file, config)


def _say_dtype(config: dict[str, Any], stored: torch.dtype, dtypes: Iterable[torch.dtype]) -> None:
    """Correct what a config, or a part of it, says of a dtype that no weight has."""
    true, right = {_plain(dtype) for dtype in dtypes}, _plain(stored)
    for part in (config, *_parts_of(config)):
        for key in _DTYPE_KEYS:
            said = part.get(key)
            if isinstance(said, str) and said not in true and isinstance(getattr(torch, said, None), torch.dtype):
                part[key] = right


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configs of a multimodal model's parts, such as text_config."""
    for key, value in config.items():
        if key.endswith("_config") and not key.startswith(("quantization", "compression")) and isinstance(value, dict):
            yield value
            yield from _parts_of(value)


def _in_the_form_of(raw: bytes, content: dict[str, Any]) -> bytes:
    """JSON with the indentation and the way of writing letters that `raw` has."""
    indent = re.match(rb"\s*\{\s*?\n([ \t]+)", raw)
    ascii_alone = raw.isascii()
    text = json.dumps(content, indent=indent[1].decode() if indent else None, ensure_ascii=ascii_alone)
    return text.encode() + raw[len(raw.rstrip()) :]
