"""One decoder block on its way from dense to pruned: what reads which input, in which order, under which statistics."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.blocks import Family, prunable_linears
from sparsegpt.capture import remember_outputs, run_watched, shared_inputs
from sparsegpt.groups import GroupSolver
from sparsegpt.hessian import HessianAccumulator
from sparsegpt.reconstruct import reconstruct_block
from sparsegpt.reports import LayerReport
from sparsegpt.settings import LinearSettings, Order
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.streams import Streams

# Linears of one block that read the same tensor, by their names inside the block.
Group = tuple[str, ...]
# For each micro-batch, the dense model's tensor at each watched submodule.
DenseInputs = list[dict[str, Tensor]]


class BlockJob:
    """One block on its way from dense to pruned."""

    def __init__(
        self,
        solver: GroupSolver,
        streams: Streams,
        family: Family,
        block: nn.Module,
        index: int,
        choices: dict[str, LinearSettings],
    ) -> None:
        self.solver, self.streams, self.family = solver, streams, family
        self.block, self.index, self.choices = block, index, choices
        self.settings = solver.settings
        self.prefix = f"{family.blocks}.{index}."
        self.linears = {name: linear for name, linear in prunable_linears(block).items() if name in choices}
        self.pruned_names: set[str] = set()
        # For each micro-batch of the pruned stream, the outputs of submodules that will not change any more.
        self.memos: list[dict[str, Any]] = [{} for _ in streams.pruned]

    @property
    def device(self) -> torch.device:
        """Where the block is now."""
        return next(self.block.parameters()).device

    def prune_linears(self) -> list[LayerReport]:
        """Prune every selected linear, stage by stage in forward order."""
        with self.solver.timed("capture"):
            groups = self._shared_inputs()
            stages = _stages(groups, self.settings.order)
            dense_inputs = self._dense_pass(stages)
        layers: list[LayerReport] = []
        for stage in stages:
            with self.solver.timed("capture"):
                statistics = self._gather(stage, _linears_from(stage[-1], groups), dense_inputs)
            with self.solver.timed("solve"):
                for group, sums in statistics.items():
                    linears = {self.prefix + name: (self.linears[name], self.choices[name]) for name in group}
                    layers += self.solver.prune(linears, *sums)
                    self.pruned_names.update(group)
        return layers

    def reconstruct(self) -> float:
        """Train the kept weights so that the block on pruned inputs gives the dense block's outputs.

        Returns the held-out loss as a share of what it was.
        """
        assert self.streams.dense is not None
        with self.solver.timed("reconstruct"):
            result = reconstruct_block(
                self.block,
                list(self.linears),
                self.streams.pruned,
                self.streams.dense,
                lambda size: self.streams.inputs.call(size, self.index),
                epochs=self.settings.reconstruct,
                learning_rate=self.settings.learning_rate,
            )
            for parameter in self.block.parameters():
                parameter.data.copy_(self.solver.as_stored(parameter.data))
        self.memos = [{} for _ in self.memos]
        if result.diverged:
            self.solver.report.warnings.append(
                f"{self.prefix[:-1]}: reconstruction diverged after {result.best_epoch} good epochs and was rolled "
                "back to the best; lower --learning-rate"
            )
        return result.after / result.before if result.before else 1.0

    def run(
        self, hidden: Tensor, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the watched submodules and the block's output, for one micro-batch; the output goes home."""
        call = self.streams.inputs.call(len(hidden), self.index)
        seen, output = run_watched(self.block, call, hidden.to(self.device), watched, unused)
        return seen, output.to(hidden.device)

    def run_pruned(
        self, step: int, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`run` for a micro-batch of the pruned stream; finished submodules, such as attention, compute only once."""
        with remember_outputs(self.block, self._finished(), self.memos[step]):
            return self.run(self.streams.pruned[step], watched, unused)

    def output(self, step: int) -> Tensor:
        """The finished block's output for a micro-batch; what is remembered serves once more and is let go."""
        memo, self.memos[step] = self.memos[step], {}
        with remember_outputs(self.block, list(memo), memo):
            return self.run(self.streams.pruned[step])[1]

    def _finished(self) -> list[str]:
        """Direct submodules all of whose linears are pruned; a bare linear's output is wide and not worth keeping.

        None where activations live in files: computing again is cheaper than another file.
        """
        if self.streams.store.scratch is not None:
            return []
        done = []
        for child, module in self.block.named_children():
            inside = {name for name in self.linears if name.startswith(f"{child}.")}
            if inside and inside <= self.pruned_names and not isinstance(module, nn.Linear):
                done.append(child)
        return done

    def _shared_inputs(self) -> list[Group]:
        hidden = self.streams.pruned[0]
        call = self.streams.inputs.call(len(hidden), self.index)
        if not self.linears:
            return []
        return shared_inputs(self.block, self.linears, call, hidden.to(self.device), self.prefix)

    def move_dense(self, watched: frozenset[str] = frozenset()) -> DenseInputs:
        """Move the dense stream through the block, which must be dense still; keep the inputs of what is watched."""
        assert self.streams.dense is not None
        kept = []
        for step, hidden in enumerate(self.streams.dense):
            seen, output = self.run(hidden, watched)
            keep = self.streams.store.keep
            kept.append({name: keep(f"dense {name}", step, t.to(hidden.device)) for name, t in seen.items()})
            self.streams.move_dense(step, output)
        return kept

    def _dense_pass(self, stages: list[list[Group]]) -> DenseInputs:
        """Move the dense stream behind the block; keep what the corrections will compare."""
        if self.streams.dense is None:
            return []
        compared = [group for stage in stages for group in stage if self._corrects(group)]
        return self.move_dense(frozenset(name for group in compared for name in self._watched(group)))

    def _corrects(self, group: Group) -> bool:
        return any(self.choices[name].corrects for name in group)

    def _watched(self, group: Group) -> list[str]:
        """Where to look for a group: its own input and, for a projection, the residual stream it is added to."""
        residual = self._residual(group)
        return [group[0]] if residual is None else [group[0], residual]

    def _residual(self, group: Group) -> str | None:
        wanted = len(group) == 1 and self.choices[group[0]].residual_correction > 0
        return self.family.residuals.get(group[0]) if wanted else None

    def _gather(
        self, stage: list[Group], unused: Group, dense_inputs: DenseInputs
    ) -> dict[Group, tuple[HessianAccumulator, DriftAccumulator]]:
        """One pass of the pruned stream for all shared inputs of a stage; `unused` linears need not be computed."""
        statistics = {
            group: (
                HessianAccumulator(self.linears[group[0]].in_features, self.device),
                DriftAccumulator(),
            )
            for group in stage
        }
        watched = frozenset(name for group in stage for name in self._watched(group))
        for step in range(len(self.streams.pruned)):
            pruned, _ = self.run_pruned(step, watched, unused)
            for group, (hessian, drift) in statistics.items():
                name, residual = group[0], self._residual(group)
                hessian.add(pruned[name])
                if not self._corrects(group):
                    continue
                dense = dense_inputs[step]
                drift.add_inputs(dense[name].to(self.device), pruned[name])
                if residual is not None:
                    drift.add_residual(dense[residual].to(self.device), pruned[residual], pruned[name])
        return statistics


def _stages(groups: list[Group], order: Order) -> list[list[Group]]:
    """Which shared inputs are gathered in one pass: see PruneSettings.order."""
    if order == "block":
        return [groups] if groups else []
    if order == "input":
        return [[group] for group in groups]
    return [[(name,)] for group in groups for name in group]


def _linears_from(last: Group, groups: list[Group]) -> Group:
    """The linears of the group that holds `last`, and of all groups after it: their outputs lead nowhere yet."""
    place = next(place for place, group in enumerate(groups) if last[0] in group)
    return tuple(name for group in groups[place:] for name in group)
