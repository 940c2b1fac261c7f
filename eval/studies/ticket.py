"""The lottery ticket (Frankle & Carbin 2019, arXiv:1803.03635; rewinding: Frankle et al. 2020, arXiv:1912.05671).

Train, remove 20% of the smallest weights of every linear, put the others back to where they were at an early step,
train again; round after round. After round k a share of 1 - 0.8^k of the weights is zero. Beside it, at each sparsity:

    same mask, new start     the mask of the tickets rewound to the last point, in a model initialised anew
    random mask              as many weights of every linear, by chance, in the original initialisation
    one-shot                 the trained dense model pruned at once by this engine's default, admm
    one-shot, then trained   the same, and then as many tokens as the k rounds of the ticket took

Whether the rewind point is stable: two trainings from there that see other batches, and how much worse than the mean of
both the models on the straight line between them are.
"""

from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from sparsegpt.eval.studies.record import Figures, Kept, Panel, Record, Row, Tensors, Train, grouped, tables_of
from sparsegpt.eval.studies.training import LanguageTraining, Masked, Masks
from sparsegpt.solvers.masks import unstructured_mask

ROUNDS, LEAVING = 5, 0.2
# Shares of the training to which weights are put back.
REWINDS = (0.0, 0.01, 0.05)
# Places on the line between two models.
BETWEEN = (0.25, 0.5, 0.75)
# Added to a seed where something else than the first training's is drawn.
OTHER = 1000
MODEL, PATH = "small language model", "between two trainings from the rewind point"
PANELS = {
    MODEL: Panel("zeros", "held-out bits per byte"),
    PATH: Panel("rewound to", "highest loss above the mean of both ends, bits per byte"),
}


def zeros_after(rounds: int) -> float:
    """The share of weights that is zero."""
    return 1 - (1 - LEAVING) ** rounds


def next_masks(weights: dict[str, Tensor], masks: Masks, rounds: int) -> Masks:
    """Trained weights [R, C] and their masks, by name -> masks of a round, bool [R, C]: the smallest leave."""
    return {
        name: unstructured_mask(weight.abs().masked_fill(~masks[name], -1), _zeros(weight, rounds))
        for name, weight in weights.items()
    }


def _zeros(weight: Tensor, rounds: int) -> int:
    return round(zeros_after(rounds) * weight.numel())


def rewind_step(rewind: float, steps: int) -> int:
    """The step that a share of the training ends at."""
    return round(rewind * steps)


class Tickets:
    """The trainings of one seed."""

    def __init__(self, record: Record, seed: int) -> None:
        self.record, self.plan, self.seed = record, record.plan, seed

    def run(self) -> None:
        """All trainings, or those that are missing."""
        dense = self._once("dense", self._dense)
        for rewind in REWINDS:
            chain = [dense]
            for rounds in range(1, ROUNDS + 1):
                train = partial(self._ticket, dense, chain[-1], rewind, rounds)
                chain.append(self._once(f"ticket-{rewind}-{rounds}", train))
            self._once(f"between-{rewind}", partial(self._between, dense, rewind))
        for rounds in range(1, ROUNDS + 1):
            self._once(f"new-start-{rounds}", partial(self._new_start, chain[rounds - 1]))
            self._once(f"random-{rounds}", partial(self._random, rounds))
            self._once(f"one-shot-{rounds}", partial(self._one_shot, dense, rounds))

    def _once(self, name: str, train: Train) -> Kept:
        return self.record.once(f"{name}-{self.seed}", train)

    def _dense(self) -> tuple[Figures, Tensors]:
        """Keeps the states at the rewind points and at the end, and the masks of the first round."""
        training = self._training()
        tensors: Tensors = {}
        done = 0
        for rewind in REWINDS:
            step = rewind_step(rewind, self.plan.steps)
            training.run(done, step)
            tensors |= grouped(str(rewind), training.state())
            done = step
        training.run(done)
        weights = training.linears()
        everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        tensors |= grouped("end", training.state()) | grouped("next", next_masks(weights, everything, 1))
        return {"bits_per_byte": training.bits_per_byte()}, tensors

    def _ticket(self, dense: Kept, before: Kept, rewind: float, rounds: int) -> tuple[Figures, Tensors]:
        training, masks = self._training(), before.tensors("next")
        training.restore(dense.tensors(str(rewind)))
        training.run(rewind_step(rewind, self.plan.steps), rule=Masked(training.model, masks))
        after = next_masks(training.linears(), masks, rounds + 1)
        return {"bits_per_byte": training.bits_per_byte()}, grouped("next", after)

    def _new_start(self, before: Kept) -> tuple[Figures, Tensors]:
        return self._from_the_start(self._training(seed=self.seed + OTHER), before.tensors("next"))

    def _random(self, rounds: int) -> tuple[Figures, Tensors]:
        training, generator = self._training(), torch.Generator().manual_seed(self.seed + OTHER)
        masks = {
            name: unstructured_mask(torch.rand(weight.shape, generator=generator), _zeros(weight, rounds))
            for name, weight in training.linears().items()
        }
        return self._from_the_start(training, masks)

    def _from_the_start(self, training: LanguageTraining, masks: Masks) -> tuple[Figures, Tensors]:
        training.run(rule=Masked(training.model, masks))
        return {"bits_per_byte": training.bits_per_byte()}, {}

    def _one_shot(self, dense: Kept, rounds: int) -> tuple[Figures, Tensors]:
        """At once, and then for as many steps as the ticket's rounds, of a schedule of their own."""
        training = LanguageTraining(self.plan.size, rounds * self.plan.steps, self.seed)
        training.restore({name: tensor for name, tensor in dense.tensors("end").items() if name.startswith("weight.")})
        masks = training.prune(str(zeros_after(rounds)))
        at_once = training.bits_per_byte()
        training.run(rule=Masked(training.model, masks))
        return {"bits_per_byte": at_once, "then_trained": training.bits_per_byte()}, {}

    def _between(self, dense: Kept, rewind: float) -> tuple[Figures, Tensors]:
        """From the rewind point with other batches, and the line from the first training's end to the end of this."""
        training = self._training(order=self.seed + OTHER)
        training.restore(dense.tensors(str(rewind)))
        training.run(rewind_step(rewind, self.plan.steps))
        ends = [dense.tensors("end"), training.state()]
        scores = [(place, self._at(training, ends, place)) for place in (0.0, *BETWEEN, 1.0)]
        mean = (scores[0][1] + scores[-1][1]) / 2
        return {"above": max(score for _, score in scores) - mean, "bits_per_byte": scores[-1][1]}, {}

    def _at(self, training: LanguageTraining, ends: list[dict[str, Tensor]], place: float) -> float:
        first, second = ends
        training.restore({name: first[name].lerp(second[name], place) for name in first if name.startswith("weight.")})
        return training.bits_per_byte()

    def _training(self, seed: int | None = None, order: int | None = None) -> LanguageTraining:
        seed = self.seed if seed is None else seed
        return LanguageTraining(self.plan.size, self.plan.steps, seed, self.seed if order is None else order)


# Line -> names of trainings in place of the seed and round, and the figure.
LINES = {
    **{f"ticket, rewound to {rewind:.0%}": (f"ticket-{rewind}", "bits_per_byte") for rewind in REWINDS},
    "same mask, new start": ("new-start", "bits_per_byte"),
    "random mask": ("random", "bits_per_byte"),
    "one-shot": ("one-shot", "bits_per_byte"),
    "one-shot, then trained": ("one-shot", "then_trained"),
}


def run(record: Record, seeds: int) -> list[Row]:
    """All trainings of the study, or those that are missing; returns the rows of its table."""
    for seed in range(seeds):
        Tickets(record, seed).run()

    def row(panel: str, line: str, place: float, name: str, figure: str) -> Row:
        values = record.values(figure, *(f"{name}-{seed}" for seed in range(seeds)))
        return Row(panel, line, (place,) * seeds, values)

    rows = [row(MODEL, "dense", 0.0, "dense", "bits_per_byte")]
    for line, (name, figure) in LINES.items():
        rows += [row(MODEL, line, zeros_after(k), f"{name}-{k}", figure) for k in range(1, ROUNDS + 1)]
    return rows + [row(PATH, "dense", rewind, f"between-{rewind}", "above") for rewind in REWINDS]


def tables(record: Record, seeds: int) -> list[Table]:
    """Lines down, zeros across; means and standard deviations over seeds."""
    return tables_of(record.rows, PANELS)
