"""Depth: which blocks leave, and how those that stay make up for them.

similarity  the blocks that turn the stream least: 1 - cos(what enters, what leaves) (Men et al. 2024, arXiv:2403.03853)
divergence  greedily, the block without which the model's predictions part least from the dense model's
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsegpt.model.capture import ModelInputs, run_watched
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.head import logits_after
from sparsegpt.model.unfuse import unfused
from sparsegpt.recovery.distill import divergence
from sparsegpt.shrinking.shapes import Anatomy
from sparsegpt.solvers.correction import DriftAccumulator, corrected_target, drift_pull, hold_back, mean_length
from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator

# Blocks that the search tries at every step: those that turn the stream least.
TRIED = 10


@dataclass
class Walk:
    """Hidden states of some micro-batches on their way through a model."""

    decoder: DecoderModel
    inputs: ModelInputs

    @classmethod
    def of(cls, decoder: DecoderModel, batches: Sequence[Tensor]) -> "Walk":
        """Of micro-batches [batch, sequence]."""
        return cls(decoder, ModelInputs(decoder, batches))

    def through(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        """What a block makes of hidden states [batch, sequence, features], for each micro-batch."""
        block = self.decoder.blocks[index]
        calls = (self.inputs.calls(tokens, "shrinking")[index] for tokens in self.inputs.batches)
        return [call.run(block, states) for call, states in zip(calls, hidden, strict=True)]

    def end(self, blocks: Sequence[int]) -> list[Tensor]:
        """Hidden states after these blocks alone."""
        hidden = list(self.inputs.hidden)
        for index in blocks:
            hidden = self.through(index, hidden)
        return hidden

    def logits(self, hidden: list[Tensor]) -> Iterator[Tensor]:
        """What the model says after hidden states, [batch, sequence, vocabulary] for each micro-batch."""
        for tokens, states in zip(self.inputs.batches, hidden, strict=True):
            yield logits_after(self.decoder, tokens, states)


def divergences(dense: Sequence[Tensor], walk: Walk, hidden: list[Tensor]) -> float:
    """Logits [batch, sequence, vocabulary] -> mean divergence of what a model says after `hidden`, in nats a token."""
    found = [divergence(ours, theirs)[0] for ours, theirs in zip(walk.logits(hidden), dense, strict=True)]
    return sum(found) / len(found)


@torch.no_grad()
def block_effects(walk: Walk) -> list[float]:
    """How far each block turns the stream: 1 - the mean cosine between what enters and what leaves."""
    hidden, found = list(walk.inputs.hidden), []
    for index in range(len(walk.decoder.blocks)):
        after = walk.through(index, hidden)
        cosines = [
            functional.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(hidden, after, strict=True)
        ]
        found.append(1 - float(torch.cat([each.flatten() for each in cosines]).mean()))
        hidden = after
    return found


@torch.no_grad()
def choose_blocks(walk: Walk, keep: int, how: str) -> tuple[int, ...]:
    """The indices of the blocks that stay, `keep` of them; how: a word of DEPTHS."""
    left = list(range(len(walk.decoder.blocks)))
    if keep == len(left):
        return tuple(left)
    effects = block_effects(walk)
    if how == "similarity":
        return tuple(sorted(sorted(left, key=lambda index: effects[index])[len(left) - keep :]))
    dense = list(walk.logits(walk.end(left)))
    while len(left) > keep:
        tried = sorted(left, key=lambda index: effects[index])[:TRIED]
        without = {index: walk.end([each for each in left if each != index]) for index in tried}
        left.remove(min(tried, key=lambda index: divergences(dense, walk, without[index])))
    return tuple(left)


@torch.no_grad()
def make_up(
    dense: DecoderModel, smaller: Anatomy, kept: Sequence[int], batches: Sequence[Tensor], share: float, damping: float
) -> int:
    """Let the blocks of `smaller` make up for those that left: each is asked for what comes before the next one kept.

    kept: what its blocks were in `dense`. The last projection of a block, W, gets the target of residual correction
    (solvers/correction.py) for the drift of the block's output. Returns how many blocks were changed; experts are not.
    """
    walks = Walk.of(dense, batches), Walk.of(smaller.decoder, batches)
    theirs, ours, changed = list(walks[0].inputs.hidden), list(walks[1].inputs.hidden), 0
    following = [*kept[1:], len(dense.blocks)]
    passed = 0
    for index, stop in enumerate(following):
        for original in range(passed, stop):
            theirs = walks[0].through(original, theirs)
        passed = stop
        if kept[index] != index or stop != kept[index] + 1:  # something has left before or right after
            changed += _correct(walks[1], smaller, index, ours, theirs, share, damping)
        ours = walks[1].through(index, ours)
    return changed


def _correct(
    walk: Walk, anatomy: Anatomy, index: int, hidden: list[Tensor], wanted: list[Tensor], share: float, damping: float
) -> int:
    name = _last_writer(anatomy, index)
    if name is None:
        return 0
    block = walk.decoder.blocks[index]
    with unfused(block):
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        gram, drift = HessianAccumulator(linear.in_features, linear.weight.device), DriftAccumulator()
        for tokens, states, target in zip(walk.inputs.batches, hidden, wanted, strict=True):
            seen, output = run_watched(block, walk.inputs.calls(tokens, "shrinking")[index], states, [name])
            gram.add(seen[name])
            drift.add_residual(target, output, seen[name].reshape(*output.shape[:-1], -1))
        scale = _multiplier(walk.decoder, block, name)
        hessian = DampedHessian(gram.take(), damping, name=walk.decoder.prefix(index) + name)
        weight = linear.weight.contiguous()
        target = corrected_target(weight, hessian, drift_pull(weight.float(), drift, 0.0, share) / scale)
        hold_back(weight, target, mean_length(weight))
        linear.weight.copy_(target)
    return 1


def _last_writer(anatomy: Anatomy, index: int) -> str | None:
    """The projection of a block's MLP, whose output is added to the stream last; None where there are experts."""
    names = [site.name for site in anatomy.sites[index] if site.part in anatomy.layout.channels]
    return names[0] if len(names) == 1 and not anatomy.decoder.family.uncorrectable else None


def _multiplier(decoder: DecoderModel, block: nn.Module, name: str) -> float:
    residual = decoder.family.residuals.get(name)
    return float(getattr(block, residual.multiplier)) if residual and residual.multiplier else 1.0
