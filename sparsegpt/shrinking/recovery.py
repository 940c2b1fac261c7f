"""Training of a smaller model on the dense one: block by block, and as a whole. All of its weights train."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegpt.counting import StepReport, counting
from sparsegpt.model.capture import ModelInputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.residence import Residence
from sparsegpt.model.streams import ActivationStore
from sparsegpt.model.unfuse import unfused
from sparsegpt.recovery.distill import Distiller, distill
from sparsegpt.recovery.reconstruct import reconstruct_block
from sparsegpt.recovery.training import training_batches
from sparsegpt.shrinking.depth import Walk
from sparsegpt.shrinking.settings import ShrinkSettings


@dataclass(frozen=True)
class Recovery:
    """Trains `smaller` on `dense`, with micro-batches [batch, sequence] of tokens.

    kept: which of the dense model's blocks those of the smaller one were. tell: hears of every step.
    """

    dense: DecoderModel
    smaller: DecoderModel
    kept: Sequence[int]
    batches: Sequence[Tensor]
    settings: ShrinkSettings
    tell: Callable[[StepReport], None]

    @torch.no_grad()
    def reconstruct(self) -> list[float]:
        """Train each block to give what the dense model has before the next one kept.

        Returns the held-out losses as shares of what they were.
        """
        dense, smaller = Walk.of(self.dense, self.batches), Walk.of(self.smaller, self.batches)
        theirs, ours, found, passed = list(dense.inputs.hidden), list(smaller.inputs.hidden), [], 0
        for index, stop in enumerate([*self.kept[1:], len(self.dense.blocks)]):
            for original in range(passed, stop):
                theirs = dense.through(original, theirs)
            passed = stop
            found.append(self._train_block(index, smaller, ours, theirs))
            ours = smaller.through(index, ours)
        return found

    def _train_block(self, index: int, walk: Walk, hidden: list[Tensor], wanted: list[Tensor]) -> float:
        block = self.smaller.blocks[index]
        with unfused(block):
            result = reconstruct_block(
                block,
                list(prunable_linears(block)),
                training_batches(self.batches, hidden, wanted),
                lambda tokens, states: walk.inputs.calls(tokens, "training")[index].run(block, states),
                epochs=self.settings.reconstruct,
                learning_rate=self.settings.learning_rate,
                counted=counting(self.tell, f"training {self.smaller.prefix(index)[:-1]}", "steps"),
            )
        return result.after / result.before if result.before else 1.0

    @torch.no_grad()
    def distill(self, tell: Callable[[int, float], None]) -> list[float]:
        """Train all blocks on what the dense model predicts; tell(epoch, held-out divergence) after each epoch.

        Returns the divergences in nats a token, epoch 0 first. A training that has not helped leaves the weights alone.
        """
        walk = Walk.of(self.dense, self.batches)
        losses: list[float] = []
        pairs = training_batches(self.batches, walk.end(range(len(self.dense.blocks))))
        residence = Residence(None, self.smaller.model.dtype, self.smaller.model.dtype)
        inputs, trained = ModelInputs(self.smaller, self.batches), dict(enumerate(map(_linears, self.smaller.blocks)))
        student = Distiller(self.smaller, inputs, residence, ActivationStore(), trained)
        epochs, rate = self.settings.distill, self.settings.distill_rate
        counted = counting(self.tell, "training the model", "steps")
        for epoch, loss in distill(student, pairs, epochs, rate, losses, counted):
            losses.append(loss)
            tell(epoch, loss)
        if losses[-1] < losses[0]:
            for index, block in enumerate(self.smaller.blocks):
                residence.settle_all(block, student.finished(index))
        return losses


def _linears(block: nn.Module) -> list[str]:
    with unfused(block):
        return list(prunable_linears(block))
