"""Linears that share one input: one Hessian, one factor, and the solution of each of them."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegpt.driver.listener import Listener
from sparsegpt.driver.reports import LayerReport, PruneReport, share_of_zeros
from sparsegpt.driver.stages import enough_tokens
from sparsegpt.model.routers import named_expert
from sparsegpt.quantization import Grid
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings
from sparsegpt.solvers import METHODS, Pruned, parse_method, prune_layer
from sparsegpt.solvers.correction import GROWTH, DriftAccumulator, corrected_target, drift_pull, hold_back, remainder
from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator

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


@dataclass
class GroupSolver:
    """Prunes groups of linears in place and writes what it did into the report.

    as_stored: new values of a parameter in the dtype of the saved file, to which they are rounded at once: all that
    follows, inside the block and after it, then sees the weights that are saved.
    """

    settings: PruneSettings
    report: PruneReport
    listener: Listener
    as_stored: Callable[[Tensor, Tensor], Tensor] = lambda values, parameter: values
    # Experts that few tokens reached, until `tell_of_experts`: (expert, tokens) of each.
    _starved: dict[Shortage, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def prune(
        self,
        linears: dict[str, tuple[nn.Linear, LinearSettings]],
        gram: HessianAccumulator,
        drift: DriftAccumulator,
        *,
        routed: bool = False,
    ) -> list[LayerReport]:
        """Prune all linears of one shared input: those of one damping share its Hessian and everything derived.

        routed: they belong to an expert. One that too few tokens reached is pruned by magnitude, without any data.
        """
        reports = []
        dampings = list(dict.fromkeys(choice.damping for _, choice in linears.values()))
        for damping in dampings:
            alike = {name: pair for name, pair in linears.items() if pair[1].damping == damping}
            reports += self._prune_alike(alike, gram, drift, routed=routed, last=damping == dampings[-1])
        return reports

    def _prune_alike(
        self,
        linears: dict[str, tuple[nn.Linear, LinearSettings]],
        gram: HessianAccumulator,
        drift: DriftAccumulator,
        *,
        routed: bool,
        last: bool,
    ) -> list[LayerReport]:
        name, (_, choice) = next(iter(linears.items()))
        starved = routed and gram.tokens < enough_tokens(gram.width)
        if starved:
            self._note(name, gram, enough_tokens(gram.width), "pruned by magnitude alone, without data")
            hessian = DampedHessian(torch.eye(gram.width, device=gram.device), name=name)
        else:
            hessian = DampedHessian(gram.take(), self._damping(name, choice, gram, routed=routed), name=name)
        targets = _targets({} if routed else linears, hessian, drift, last=last)
        reports: list[LayerReport] = []
        for name, (linear, choice) in linears.items():
            started = time.perf_counter()
            target = targets.pop(name, None)
            hessian.keep_factor = len(reports) + 1 < len(linears)
            method = parse_method(choice.method)
            if starved and not method.whole:
                method = METHODS["magnitude"]
            weight = linear.weight.contiguous()  # a transposed view, where the model keeps it so
            solve = functools.partial(
                prune_layer, weight, hessian, choice.sparsity, method, choice.block_size, rounding=choice.rounding
            )
            pruned = solve() if target is None else self._solve_corrected(weight, hessian, target, solve)
            linear.weight.copy_(self.as_stored(pruned.weight, linear.weight))
            report = LayerReport(
                name=name,
                shape=(linear.out_features, linear.in_features),
                sparsity=str(choice.sparsity),
                method=method.name,
                zeros=share_of_zeros(linear.weight),
                relative_error=pruned.relative_error,
                damping=pruned.damping,
                tokens=gram.tokens,
                seconds=time.perf_counter() - started,
                grid=None if choice.quantize is None else str(choice.quantize),
                bits=_bits(choice, linear.in_features),
            )
            reports.append(report)
            self.listener.layer(report)
        self.report.layers += reports
        return reports

    def _solve_corrected(
        self, weight: Tensor, hessian: DampedHessian, target: Tensor, solve: Callable[..., Pruned]
    ) -> Pruned:
        """Solve for a target that is held within what the layer can repair, with a warning where it had to be."""
        held, most = hold_back(weight, target)
        if held:
            self.report.warnings.append(
                f"{hessian.name}: its correction would have moved {held} of {len(weight)} rows, by up to {most:.3g} "
                f"times their length, and was held to {GROWTH:g}"
            )
        pruned = solve(target=target)
        left = remainder(weight, target, pruned.weight, hessian)
        if left.found <= WORSE * max(left.plain, 0.0):
            return pruned
        # By the estimate plain pruning leaves less: look, and take the share of the correction that leaves the least.
        tried = {1.0: (left.found, pruned)}
        for share in SHARES:
            part = solve(target=torch.lerp(weight.to(target.dtype), target, share))
            tried[share] = remainder(weight, target, part.weight, hessian).found, part
        best = min(tried, key=lambda share: tried[share][0])
        if best < 1:
            self.report.warnings.append(
                f"{hessian.name}: all of its correction would have raised the loss beyond that of plain pruning; "
                f"{best:.0%} of it was taken"
            )
        return tried[best][1]

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


def _targets(
    linears: dict[str, tuple[nn.Linear, LinearSettings]], hessian: DampedHessian, drift: DriftAccumulator, *, last: bool
) -> dict[str, Tensor]:
    """What the kept weights of the linears that are corrected should imitate. last: nobody else needs the drift."""
    corrected = {name: pair for name, pair in linears.items() if pair[1].corrects}
    pulls = {
        name: drift_pull(
            linear.weight.to(hessian.raw.dtype), drift, choice.error_correction, choice.residual_correction
        )
        for name, (linear, choice) in corrected.items()
    }
    if last:
        drift.release()  # before the factor takes as much
    return {name: corrected_target(linear.weight, hessian, pulls[name]) for name, (linear, _) in corrected.items()}
