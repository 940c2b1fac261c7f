"""Sparse from day one: SR-STE for 2:4 (Zhou et al. 2021, arXiv:2102.04010), RigL (Evci et al. 2020, arXiv:1911.11134).

SR-STE: the mask of the largest of every four is chosen anew in every step. The model computes with W * mask; the
gradient there goes straight through to all of W, and lambda (1 - mask) * W draws to zero what is not kept.

RigL: a fixed share of every linear is zero, at first by chance. Now and then, instead of a step, each linear drops a
share alpha / 2 (1 + cos(pi t / end)) of its smallest weights and grows as many, from zero, where the gradient is
largest; after three quarters of the training no more. Published every 100 steps; short trainings do so MOVES times.

Beside them, for the same tokens: the dense training pruned at once by this engine's default, admm, at its end; and
pruned so after three quarters of it, the last quarter with the mask.
"""

import math
from functools import partial
from itertools import chain

import torch
from rich.table import Table
from torch import Tensor, nn

from sparsegpt.eval.studies.record import Figures, Kept, Panel, Record, Row, Tensors, Train, grouped, tables_of
from sparsegpt.eval.studies.training import LanguageTraining, Masked, Masks, Rule
from sparsegpt.solvers.masks import layer_mask, unstructured_mask
from sparsegpt.sparsity import Sparsity, parse_sparsity

DECAY = 2e-4  # SR-STE's lambda
DROPPED = 0.3  # RigL's alpha
PUBLISHED_INTERVAL, MOVES = 100, 24
# The share of the training after which RigL's masks stay, and after which one-shot pruning leaves the rest to mend.
LAST_MOVE = 0.75
# Panel -> its patterns; from day one the first by RigL, the second by SR-STE.
PATTERNS = {"unstructured": ("0.5", "0.6", "0.7", "0.8", "0.9"), "2:4": ("2:4",)}
PANELS = {panel: Panel("zeros", "held-out bits per byte") for panel in PATTERNS}


class StraightThrough(Rule):
    """SR-STE on weights [R, C] by name."""

    def __init__(self, weights: dict[str, Tensor], pattern: Sparsity) -> None:
        self.weights, self.pattern = weights, pattern
        self.masks: Masks = {}
        self.dense: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self, step: int) -> None:
        """The model computes with the largest of every group."""
        for name, weight in self.weights.items():
            self.dense[name] = weight.clone()
            self.masks[name] = layer_mask(weight.abs(), self.pattern)
            weight.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def gradients(self, step: int) -> bool:
        """All weights are there again; each has the gradient of what was used, and those not kept their decay."""
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.copy_(self.dense[name])
            weight.grad.add_(self.dense[name].masked_fill(self.masks[name], 0), alpha=DECAY)
        return True

    def finish(self) -> None:
        """What is used is what would be used in a next step."""
        self.before(-1)


class RigL(Masked):
    """Masks that move, over `steps` steps: of every linear as many weights as before."""

    def __init__(self, model: nn.Module, masks: Masks, steps: int) -> None:
        super().__init__(model, masks)
        self.end = round(LAST_MOVE * steps)
        self.interval = max(1, min(PUBLISHED_INTERVAL, self.end // MOVES))

    def moves(self, step: int) -> bool:
        """Whether masks move in this step instead of weights."""
        return 0 < step < self.end and step % self.interval == 0

    def gradients(self, step: int) -> bool:
        """Masks move by the gradients of all weights."""
        if not self.moves(step):
            return super().gradients(step)
        share = DROPPED / 2 * (1 + math.cos(math.pi * step / self.end))
        for name, weight in self.weights.items():
            assert weight.grad is not None
            stay, come = drop_and_grow(weight, weight.grad, self.masks[name], share)
            with torch.no_grad():
                weight.masked_fill_(~stay, 0)
            self.masks[name] = stay | come
        return False


@torch.no_grad()
def drop_and_grow(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Weight, gradient, mask [R, C] -> which stay and which come, bool [R, C].

    Of the kept, a share leaves: the smallest. As many come, from all that do not stay: where the gradient is largest.
    """
    kept = int(mask.sum())
    leave = round(share * kept)
    stay = unstructured_mask(weight.abs().masked_fill(~mask, -1), mask.numel() - kept + leave)
    come = unstructured_mask(gradient.abs().masked_fill(stay, -1), mask.numel() - leave)
    return stay, come


class DayOne:
    """The trainings of one seed."""

    def __init__(self, record: Record, seed: int) -> None:
        self.record, self.plan, self.seed = record, record.plan, seed

    def run(self) -> None:
        """All trainings, or those that are missing."""
        dense = self._once("dense", self._dense)
        for pattern in chain.from_iterable(PATTERNS.values()):
            from_day_one = self._straight_through if ":" in pattern else self._rigl
            self._once(f"sparse-{pattern}", partial(from_day_one, pattern))
            self._once(f"one-shot-{pattern}", partial(self._one_shot, dense, pattern))

    def _once(self, name: str, train: Train) -> Kept:
        return self.record.once(_key(name, self.seed), train)

    def _training(self) -> LanguageTraining:
        return LanguageTraining(self.plan.size, self.plan.steps, self.seed)

    def _dense(self) -> tuple[Figures, Tensors]:
        training, late = self._training(), round(LAST_MOVE * self.plan.steps)
        training.run(end=late)
        tensors = grouped("late", training.state())
        training.run(late)
        return {"bits_per_byte": training.bits_per_byte()}, tensors | grouped("end", training.state())

    def _straight_through(self, pattern: str) -> tuple[Figures, Tensors]:
        training = self._training()
        training.run(rule=StraightThrough(training.linears(), parse_sparsity(pattern)))
        return {"bits_per_byte": training.bits_per_byte()}, {}

    def _rigl(self, pattern: str) -> tuple[Figures, Tensors]:
        training, generator = self._training(), torch.Generator().manual_seed(self.seed)
        masks = {
            name: layer_mask(torch.rand(weight.shape, generator=generator), parse_sparsity(pattern))
            for name, weight in training.linears().items()
        }
        training.run(rule=RigL(training.model, masks, self.plan.steps))
        return {"bits_per_byte": training.bits_per_byte()}, {}

    def _one_shot(self, dense: Kept, pattern: str) -> tuple[Figures, Tensors]:
        training = self._training()
        training.restore(dense.tensors("end"))
        training.prune(pattern)
        at_end = training.bits_per_byte()
        training.restore(dense.tensors("late"))
        masks = training.prune(pattern)
        training.run(round(LAST_MOVE * self.plan.steps), rule=Masked(training.model, masks))
        return {"bits_per_byte": at_end, "mended": training.bits_per_byte()}, {}


def _key(name: str, seed: int) -> str:
    """The name of a training, which is a file's too."""
    return f"{name}-{seed}".replace(":", "of")


# Line -> the first part of its trainings' names, and the figure.
LINES = {
    "sparse from day one": ("sparse", "bits_per_byte"),
    "one-shot at the end": ("one-shot", "bits_per_byte"),
    "one-shot at 3/4, then the last quarter": ("one-shot", "mended"),
}


def run(record: Record, seeds: int) -> list[Row]:
    """All trainings of the study, or those that are missing; returns the rows of its table."""
    for seed in range(seeds):
        DayOne(record, seed).run()

    def row(panel: str, line: str, zeros: float, name: str, figure: str) -> Row:
        return Row(panel, line, (zeros,) * seeds, record.values(figure, *(_key(name, seed) for seed in range(seeds))))

    rows = []
    for panel, patterns in PATTERNS.items():
        rows.append(row(panel, "dense", 0.0, "dense", "bits_per_byte"))
        for line, (name, figure) in LINES.items():
            zeros = [parse_sparsity(pattern).zeros for pattern in patterns]
            rows += [
                row(panel, line, share, f"{name}-{pattern}", figure)
                for share, pattern in zip(zeros, patterns, strict=True)
            ]
    return rows


def tables(record: Record, seeds: int) -> list[Table]:
    """Lines down, zeros across; means and standard deviations over seeds."""
    return tables_of(record.rows, PANELS)
