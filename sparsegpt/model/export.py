"""A model written as an ordinary Hugging Face folder, one block at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparsegpt.files.tensor_files import ShardedWriter, header_room
from sparsegpt.model.families import decoder_blocks, family_of
from sparsegpt.model.loading import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into a folder.

    Weights go out as they are at home, under the names of the model's own checkpoints; memory is needed for one block.
    """
    model = loaded.model
    computing = model.dtype
    names = [name for part in _parts(model) for name in _checkpoint_names(model, part)]
    with ShardedWriter(folder, header_room(names)) as writer:
        for part in _parts(model):
            for name, tensor in _checkpoint_names(model, part).items():
                writer.add((name, tensor.to(loaded.stored_dtype) if tensor.dtype == computing else tensor))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = loaded.stored_dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _parts(model: "PreTrainedModel") -> Iterator[dict[str, Tensor]]:
    """The model's tensors without repetition, first those outside of the blocks, then block by block."""
    family = family_of(model)
    blocks = decoder_blocks(model, family)
    seen: set[tuple[int, int]] = set()

    def new(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without those that another name, such as that of a tied embedding, has brought already."""
        fresh = {}
        for name, tensor in tensors.items():
            place = (tensor.data_ptr(), tensor.numel())
            if place not in seen:
                seen.add(place)
                fresh[name] = tensor
        return fresh

    inside = f"{family.blocks}."
    yield new({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)})
    for index, block in enumerate(blocks):
        yield new(block.state_dict(prefix=f"{inside}{index}."))


def _checkpoint_names(model: "PreTrainedModel", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as checkpoints of this architecture name and split them: the loader merges experts, for example."""
    from transformers.core_model_loading import revert_weight_conversion

    named: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return named
