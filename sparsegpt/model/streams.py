"""The activations between two decoder blocks, in memory or in files."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sparsegpt.files.mapped import mapped_empty
from sparsegpt.model.capture import BlockCall, ModelInputs


@dataclass
class ActivationStore:
    """Keeps activations where they are, or, with a `scratch` folder, in files there instead of memory."""

    scratch: Path | None = None
    _slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def keep(self, role: str, step: int, tensor: Tensor) -> Tensor:
        """The tensor, or its values in the file of this role and micro-batch, whose former content is lost."""
        if self.scratch is None:
            return tensor
        slot = self._slots.get((role, step))
        if slot is None or slot.shape != tensor.shape or slot.dtype != tensor.dtype:
            slot = self._slots[role, step] = mapped_empty(tensor.shape, tensor.dtype, self.scratch)
        return slot.copy_(tensor)


@dataclass
class Streams:
    """Hidden states in micro-batches [batch, sequence, features], in front of the block that comes next.

    inputs: how the model calls its blocks, and where the streams begin. pruned: what the pruned model computes; dense:
    what the dense model does, None when nobody compares the two.
    """

    inputs: ModelInputs
    store: ActivationStore
    pruned: list[Tensor]
    dense: list[Tensor] | None

    @classmethod
    def begin(cls, inputs: ModelInputs, store: ActivationStore, *, with_dense: bool) -> "Streams":
        """In front of the first block, where the two streams are still the same tensors."""
        return cls(inputs, store, inputs.hidden, list(inputs.hidden) if with_dense else None)

    def call(self, step: int, index: int) -> BlockCall:
        """How a block is called for a micro-batch of the pruned stream."""
        return self.inputs.calls(self.inputs.batches[step], "pruned")[index]

    def dense_call(self, step: int, index: int) -> BlockCall:
        """How a block is called for a micro-batch of the dense stream."""
        return self.inputs.calls(self.inputs.batches[step], "dense")[index]

    def move_pruned(self, step: int, tensor: Tensor) -> None:
        """Replace one micro-batch of the pruned stream: it has passed a block."""
        self.pruned[step] = self.store.keep("pruned", step, tensor)

    def move_dense(self, step: int, tensor: Tensor) -> None:
        """Replace one micro-batch of the dense stream."""
        assert self.dense is not None
        self.dense[step] = self.store.keep("dense", step, tensor)
