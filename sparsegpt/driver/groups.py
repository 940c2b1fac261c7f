"""Linears that share one input: one Hessian, one factor, and the solution of each of them."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegpt.driver.ranks import ONE_RANK, Ranks, Share, Told
from sparsegpt.driver.reports import LayerReport, Listener, PruneReport, share_of_zeros
from sparsegpt.driver.stages import Matrix, enough_tokens, share_out
from sparsegpt.grid import Grid
from sparsegpt.model.routers import named_expert
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings
from sparsegpt.solvers import METHODS, Pruned, parse_method, prune_layer
from sparsegpt.solvers.correction import (
    GROWTH,
    DriftAccumulator,
    Remainder,
    corrected_target,
    drift_pull,
    hold_back,
    mean_length,
    remainder,
)
from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator
from sparsegpt.solvers.methods import Method

# A corrected layer may leave this much more than what plain pruning is estimated to leave before both are compared.
WORSE = 1.25
# Of a correction that does harm, tried beside all of it.
SHARES = (0.5, 0.25, 0.0)


class Shortage(NamedTuple):
    """Experts that fewer than `limit` calibration tokens reached, and what was done with them."""

    linears: str
    width: int
    limit: int
    treatment: str


class Task(NamedTuple):
    """Linears of one shared input, by full name, with what was gathered of it. routed: they belong to an expert."""

    linears: dict[str, tuple[nn.Linear, LinearSettings]]
    gram: HessianAccumulator
    drift: DriftAccumulator
    routed: bool = False

    @property
    def starved(self) -> bool:
        """Whether it is an expert that too few tokens reached: pruned by magnitude, without any data."""
        return self.routed and self.gram.tokens < enough_tokens(self.gram.width)

    def method_of(self, choice: LinearSettings) -> Method:
        """How a linear is solved."""
        method = parse_method(choice.method)
        return METHODS["magnitude"] if self.starved and not method.whole else method

    def matrices(self) -> dict[str, Matrix]:
        """What is to be shared out."""
        return {
            name: Matrix(linear.out_features, linear.in_features, self.method_of(choice).parts_rows(choice.sparsity))
            for name, (linear, choice) in self.linears.items()
        }


class Solved(NamedTuple):
    """What a rank tells of a linear; the zeros are counted once the weight is whole."""

    report: LayerReport
    warnings: tuple[str, ...]


class Fit(NamedTuple):
    """A solution of some rows; loss and energy, the largest damping, and warnings are those of the whole layer."""

    weight: Tensor
    loss: float
    energy: float
    damping: float
    warnings: tuple[str, ...] = ()


@dataclass
class GroupSolver:
    """Prunes groups of linears in place and writes what it did into the report.

    as_stored: new values of a parameter in the dtype of the saved file, to which they are rounded at once: all that
    follows, inside the block and after it, then sees the weights that are saved. ranks: who solves with it.
    """

    settings: PruneSettings
    report: PruneReport
    listener: Listener
    as_stored: Callable[[Tensor, Tensor], Tensor] = lambda values, parameter: values
    ranks: Ranks = ONE_RANK
    # Experts that few tokens reached, until `tell_of_experts`: (expert, tokens) of each.
    _starved: dict[Shortage, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def prune(self, tasks: list[Task]) -> list[LayerReport]:
        """Prune all linears of some shared inputs, which do not feed one another; the tasks are used up."""
        weights = {name: linear.weight for task in tasks for name, (linear, _) in task.linears.items()}
        shares = share_out([task.matrices() for task in tasks], self.ranks)
        reports = []
        for solved in self.ranks.exchange(self._solve_all(tasks, shares)):
            self.report.warnings += solved.warnings
            report = replace(solved.report, zeros=share_of_zeros(weights[solved.report.name]))
            reports.append(report)
            self.report.layers.append(report)
            self.listener.layer(report)
        return reports

    def _solve_all(self, tasks: list[Task], shares: dict[str, Share]) -> Iterator[Told]:
        """This rank's share of the linears: those of one damping share a Hessian and everything derived."""
        while tasks:
            task = tasks.pop(0)
            dampings = list(dict.fromkeys(choice.damping for _, choice in task.linears.values()))
            for damping in dampings:
                alike = {name: pair for name, pair in task.linears.items() if pair[1].damping == damping}
                yield from self._solve_alike(task._replace(linears=alike), shares, last=damping == dampings[-1])

    def _solve_alike(self, task: Task, shares: dict[str, Share], *, last: bool) -> Iterator[Told]:
        hessian = self._hessian(task)
        mine = {name: pair for name, pair in task.linears.items() if shares[name].rows}
        targets = _targets({} if task.routed else mine, hessian, task.drift, shares, last=last)
        left = len(mine)
        for name, (linear, _) in task.linears.items():
            solved = None
            if name in mine:
                left -= 1
                hessian.keep_factor = left > 0
                solved = self._solve(name, task, hessian, targets.pop(name, None), shares[name])
            yield Told(linear.weight, shares[name], solved)

    def _solve(self, name: str, task: Task, hessian: DampedHessian, target: Tensor | None, share: Share) -> Solved:
        """Solve the rows of a linear that are this rank's, in place."""
        started = time.perf_counter()
        linear, choice = task.linears[name]
        method, place = task.method_of(choice), linear.weight[share.own]
        weight = place.contiguous()  # a transposed view, where the model keeps it so
        solve = functools.partial(
            prune_layer, weight, hessian, choice.sparsity, method, choice.block_size, rounding=choice.rounding
        )
        fit = _fit(solve(), share.team) if target is None else _fit_target(weight, hessian, target, solve, share.team)
        place.copy_(self.as_stored(fit.weight, linear.weight))
        report = LayerReport(
            name=name,
            shape=(linear.out_features, linear.in_features),
            sparsity=str(choice.sparsity),
            method=method.name,
            zeros=0.0,
            relative_error=fit.loss / fit.energy if fit.energy > 0 else 0.0,
            damping=fit.damping,
            tokens=task.gram.tokens,
            seconds=time.perf_counter() - started,
            grid=None if choice.quantize is None else str(choice.quantize),
            bits=_bits(choice, linear.in_features),
        )
        return Solved(report, fit.warnings)

    def _hessian(self, task: Task) -> DampedHessian:
        (name, (_, choice)), gram = next(iter(task.linears.items())), task.gram
        if task.starved:
            self._note(name, gram, enough_tokens(gram.width), "pruned by magnitude alone, without data")
            return DampedHessian(torch.eye(gram.width, device=gram.device), name=name)
        return DampedHessian(gram.take(), self._damping(name, choice, gram, routed=task.routed), name=name)

    def _damping(self, name: str, choice: LinearSettings, gram: HessianAccumulator, *, routed: bool) -> float:
        """The damping asked for, raised where fewer tokens than inputs leave the Hessian singular, with a warning."""
        width = gram.width
        damping = choice.damping_for(width, gram.tokens)
        if gram.tokens >= width:
            return damping
        raised = damping * width / gram.tokens
        if routed:
            self._note(name, gram, width, "solved with more damping")
            return raised
        text = (
            f"only {gram.tokens} calibration tokens for {width} input features; damping raised from {damping:g} to "
            f"{raised:g}, here and wherever this is so; give more samples or longer ones"
        )
        if not any(warning.endswith(text) for warning in self.report.warnings):
            self.report.warnings.append(f"{name}: {text}")
        return raised

    def _note(self, name: str, gram: HessianAccumulator, limit: int, treatment: str) -> None:
        path, number, linear = named_expert(name)
        shortage = Shortage(f"{path}.*.{linear}", gram.width, limit, treatment)
        self._starved[shortage].append((number, gram.tokens))

    def tell_of_experts(self) -> None:
        """Add one warning for all experts of a block that share a shortage."""
        for shortage, found in self._starved.items():
            named = ", ".join(f"{number}: {tokens}" for number, tokens in sorted(found)[:8])
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            self.report.warnings.append(
                f"{shortage.linears}: experts reached by fewer than {shortage.limit} calibration tokens "
                f"({shortage.width} input features) were {shortage.treatment}: {named}{more} tokens; give more samples "
                "or longer ones"
            )
        self._starved.clear()

    def tell_of_unscaled(self, names: Iterable[str]) -> None:
        """Warn of linears whose inputs should be scaled and cannot be; once for all blocks that have the same."""
        if named := ", ".join(sorted(names)):
            text = f"inputs of {named} are not scaled, as nothing before them is known to take the inverse"
            if text not in self.report.warnings:
                self.report.warnings.append(text)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the wall seconds of a part of the work; a GPU is waited for."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.report.seconds[part] += time.perf_counter() - started


def scaled_grid(choice: LinearSettings) -> Grid | None:
    """The grid of a linear whose input its quantizer scales first; None for others."""
    return choice.quantize if choice.rounding is not None and choice.rounding.quantizer.scales_inputs else None


def _bits(choice: LinearSettings, width: int) -> float | None:
    """Bits of a weight as it can be stored, whichever way is the smaller; None where it is on no grid."""
    if choice.quantize is None:
        return None
    return min(choice.quantize.bits_per_weight(width, kept) for kept in (1.0, 1 - choice.sparsity.zeros))


def _fit(pruned: Pruned, team: Ranks) -> Fit:
    losses, energies, dampings = zip(*team.gather((pruned.loss, pruned.energy, pruned.damping)), strict=True)
    return Fit(pruned.weight, sum(losses), sum(energies), max(dampings))


def _fit_target(
    weight: Tensor, hessian: DampedHessian, target: Tensor, solve: Callable[..., Pruned], team: Ranks
) -> Fit:
    """Solve for a target that is held within what the layer can repair, with a warning where it had to be."""
    warnings = []
    held, most = zip(*team.gather(hold_back(weight, target, team.mean(mean_length(weight)))), strict=True)
    rows = sum(team.gather(len(weight)))
    if any(held):
        warnings.append(
            f"{hessian.name}: its correction would have moved {sum(held)} of {rows} rows, by up "
            f"to {max(most):.3g} times their length, and was held to {GROWTH:g}"
        )

    def left_by(pruned: Pruned) -> Remainder:
        return sum(team.gather(remainder(weight, target, pruned.weight, hessian)), start=Remainder())

    pruned = solve(target=target)
    left = left_by(pruned)
    if left.found <= WORSE * max(left.plain, 0.0):
        return _fit(pruned, team)._replace(warnings=tuple(warnings))
    # By the estimate plain pruning leaves less: look, and take the share of the correction that leaves the least.
    tried = {1.0: (left.found, pruned)}
    for share in SHARES:
        part = solve(target=torch.lerp(weight.to(target.dtype), target, share))
        tried[share] = left_by(part).found, part
    best = min(tried, key=lambda share: tried[share][0])
    if best < 1:
        warnings.append(
            f"{hessian.name}: all of its correction would have raised the loss beyond that of plain pruning; "
            f"{best:.0%} of it was taken"
        )
    return _fit(tried[best][1], team)._replace(warnings=tuple(warnings))


def _targets(
    linears: dict[str, tuple[nn.Linear, LinearSettings]],
    hessian: DampedHessian,
    drift: DriftAccumulator,
    shares: dict[str, Share],
    *,
    last: bool,
) -> dict[str, Tensor]:
    """What the kept weights of the linears that are corrected should imitate, in the rows that are this rank's.

    last: nobody else needs the drift.
    """
    corrected = {name: pair for name, pair in linears.items() if pair[1].corrects}
    rows = {name: linear.weight[shares[name].own] for name, (linear, _) in corrected.items()}
    pulls = {
        name: drift_pull(
            rows[name].to(hessian.raw.dtype),
            drift.of_rows(shares[name].own),
            choice.error_correction,
            choice.residual_correction,
        )
        for name, (_, choice) in corrected.items()
    }
    if last:
        drift.release()  # before the factor takes as much
    return {name: corrected_target(rows[name], hessian, pull) for name, pull in pulls.items()}
