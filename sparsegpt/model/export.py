"""A model written as an ordinary Hugging Face folder, one block at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparsegpt.files.tensor_files import ShardedWriter, header_room
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.loading import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into a folder.

    Weights go out as they are at home, under the names of the model's own checkpoints; memory is needed for one block.
    """
    model = loaded.model
    computing = model.dtype
    names = [name for part in _parts(loaded.decoder) for name in _checkpoint_names(model, part)]
    with ShardedWriter(folder, header_room(names)) as writer:
        for part in _parts(loaded.decoder):
            for name, tensor in _checkpoint_names(model, part).items():
                writer.add((name, tensor.to(loaded.stored_dtype) if tensor.dtype == computing else tensor))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = loaded.stored_dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _parts(decoder: DecoderModel) -> Iterator[dict[str, Tensor]]:
    """The model's tensors without repetition, first those outside of the blocks, then block by block."""
    seen: set[tuple[int, int]] = set()

    def new(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without those that another name, such as that of a tied embedding, has brought already."""
        fresh = {}
        for name, tensor in tensors.items():
            memory = (tensor.data_ptr(), tensor.numel())
            if memory not in seen:
                seen.add(memory)
                fresh[name] = tensor
        return fresh

    inside = f"{decoder.family.blocks}."
    yield new({name: tensor for name, tensor in decoder.model.state_dict().items() if not name.startswith(inside)})
    for prefix, block in decoder.by_prefix():
        yield new(block.state_dict(prefix=prefix))


def _checkpoint_names(model: "PreTrainedModel", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as checkpoints of this architecture name and split them: the loader merges experts, for example."""
    from transformers.core_model_loading import revert_weight_conversion

    named: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return named
