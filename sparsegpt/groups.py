"""Linears that share one input: one Hessian, one factor, and the solution of each of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegpt.hessian import DampedHessian, HessianAccumulator
from sparsegpt.reports import LayerReport, PruneReport
from sparsegpt.settings import LinearSettings, PruneSettings
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.correction import DriftAccumulator, corrected_target


@dataclass
class GroupSolver:
    """Prunes groups of linears in place and writes what it did into the report.

    as_stored: a weight in the dtype of the saved file, to which it is rounded at once: all that follows, inside the
    block and behind it, then sees the weights that are saved.
    """

    settings: PruneSettings
    report: PruneReport
    on_layer: Callable[[LayerReport], None]
    as_stored: Callable[[Tensor], Tensor]

    def prune(
        self, linears: dict[str, tuple[nn.Linear, LinearSettings]], gram: HessianAccumulator, drift: DriftAccumulator
    ) -> list[LayerReport]:
        """Prune all linears of one shared input: those of one damping share its Hessian and everything derived."""
        reports = []
        for damping in dict.fromkeys(choice.damping for _, choice in linears.values()):
            alike = {name: pair for name, pair in linears.items() if pair[1].damping == damping}
            reports += self._prune_alike(alike, gram, drift)
        return reports

    def _prune_alike(
        self, linears: dict[str, tuple[nn.Linear, LinearSettings]], gram: HessianAccumulator, drift: DriftAccumulator
    ) -> list[LayerReport]:
        name, (_, choice) = next(iter(linears.items()))
        hessian = DampedHessian(gram.take(), self._damping(name, choice, gram), name=name)
        reports = []
        for name, (linear, choice) in linears.items():
            started = time.perf_counter()
            target = None
            if choice.corrects:
                shares = choice.error_correction, choice.residual_correction
                target = corrected_target(linear.weight, hessian, drift, *shares)
            method = METHODS[choice.method]
            pruned = prune_layer(linear.weight, hessian, choice.sparsity, method, choice.block_size, target=target)
            linear.weight.copy_(self.as_stored(pruned.weight))
            report = LayerReport(
                name=name,
                shape=(linear.out_features, linear.in_features),
                sparsity=str(choice.sparsity),
                method=choice.method,
                zeros=1 - float(pruned.mask.sum()) / pruned.mask.numel(),
                relative_error=pruned.relative_error,
                damping=pruned.damping,
                tokens=gram.tokens,
                seconds=time.perf_counter() - started,
            )
            reports.append(report)
            self.on_layer(report)
        self.report.layers += reports
        return reports

    def _damping(self, name: str, choice: LinearSettings, gram: HessianAccumulator) -> float:
        """The damping asked for, raised where fewer tokens than inputs leave the Hessian singular, with a warning."""
        width = gram.width
        damping = choice.damping_for(width, gram.tokens)
        if gram.tokens >= width:
            return damping
        raised = damping * width / gram.tokens
        self.report.warnings.append(
            f"{name}: only {gram.tokens} calibration tokens for {width} input features; damping raised from "
            f"{damping:g} to {raised:g}; give more --samples or a longer --seqlen"
        )
        return raised

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the wall seconds of a part of the work; a GPU is waited for."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.report.seconds[part] += time.perf_counter() - started
