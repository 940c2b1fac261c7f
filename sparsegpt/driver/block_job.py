"""One decoder block on its way from dense to pruned: what reads which input, in which order, under which statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.driver.groups import GroupSolver, Task, scaled_grid
from sparsegpt.driver.reports import LayerReport
from sparsegpt.driver.stages import Group, plan_stages, waves
from sparsegpt.model.capture import BlockCall, remember_outputs, run_watched, shared_inputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import Residual, prunable_linears
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.streams import Streams
from sparsegpt.recovery.reconstruct import reconstruct_block
from sparsegpt.recovery.training import GridWeight, training_batches
from sparsegpt.rotation.rotatable import Rotatable
from sparsegpt.rotation.scaling import InputStatistics, Place, places
from sparsegpt.settings.prune_settings import LinearSettings
from sparsegpt.solvers.correction import DriftAccumulator
from sparsegpt.solvers.hessian import HessianAccumulator

# For each micro-batch, the dense model's tensor at each watched submodule.
DenseInputs = list[dict[str, Tensor]]


class BlockJob:
    """One block on its way from dense to pruned; made and used inside `unfuse.unfused(block)`."""

    def __init__(
        self,
        solver: GroupSolver,
        streams: Streams,
        decoder: DecoderModel,
        index: int,
        choices: dict[str, LinearSettings],
    ) -> None:
        self.solver, self.streams, self.decoder, self.family = solver, streams, decoder, decoder.family
        self.block, self.index, self.choices = decoder.blocks[index], index, choices
        self.settings = solver.settings
        self.prefix = decoder.prefix(index)
        self.linears = {name: linear for name, linear in prunable_linears(self.block).items() if name in choices}
        self.expert_of = mixture_of(self.block).expert_of
        self.pruned_names: set[str] = set()
        # For each micro-batch of the pruned stream, the outputs of submodules that will not change any more.
        self.memos: list[dict[str, Any]] = [{} for _ in streams.pruned]

    @property
    def device(self) -> torch.device:
        """Where the block is now."""
        return next(self.block.parameters()).device

    def scale_inputs(self) -> None:
        """Scale the inputs of linears whose quantizer asks for it, with what comes before them, in the dense block.

        Inputs that nothing before them can take the inverse of stay as they are, with a warning that names them.
        """
        wanted = {name: grid for name, choice in self.choices.items() if (grid := scaled_grid(choice)) is not None}
        if not wanted:
            return
        with self.solver.timed("capture"):
            found = [
                place for place in places(Rotatable(self.decoder), self.block) if place.readers.keys() & wanted.keys()
            ]
            statistics = self._see_inputs(found)
        with self.solver.timed("solve"):
            for place, seen in zip(found, statistics, strict=True):
                here = {name: grid for name, grid in wanted.items() if name in place.readers}
                pairs = [(self.linears[name].weight, grid) for name, grid in here.items()]
                place.scale(seen.scales(pairs, place.tie))
            for parameter in self.block.parameters():
                parameter.data.copy_(self.solver.as_stored(parameter.data, parameter))
        self.solver.tell_of_unscaled(wanted.keys() - {name for place in found for name in place.readers})

    def _see_inputs(self, found: Sequence[Place]) -> list[InputStatistics]:
        """One pass of all ranks' pruned streams through the dense block."""
        watched = frozenset(place.watched for place in found)
        statistics: list[InputStatistics] = []
        for step, hidden in enumerate(self.streams.pruned):
            seen, _ = self.run(self.streams.call(step, self.index), hidden, watched)
            inputs = [seen[place.watched] for place in found]
            statistics = statistics or [InputStatistics(tensor.shape[-1], self.device) for tensor in inputs]
            for one, tensor in zip(statistics, inputs, strict=True):
                one.add(tensor)
        self.solver.ranks.add_up(*statistics)
        return statistics

    def prune_linears(self) -> list[LayerReport]:
        """Prune every selected linear, stage by stage in forward order."""
        with self.solver.timed("capture"):
            in_waves = waves(self._shared_inputs(), self.expert_of)
            groups = [group for wave in in_waves for group in wave]
            stages = plan_stages(
                in_waves, self.settings.order, lambda name: self.linears[name].in_features, self.expert_of
            )
            dense_inputs = self._dense_pass(stages)
        layers: list[LayerReport] = []
        for stage in stages:
            # The members of a stage do not feed one another, unless the stage is the whole block.
            idle_from = stage[-1] if self.settings.order == "block" else stage[0]
            with self.solver.timed("capture"):
                statistics = self._gather(stage, _linears_from(idle_from, groups), dense_inputs)
            with self.solver.timed("solve"):
                layers += self.solver.prune([self._task(group, *statistics.pop(group)) for group in stage])
            self.pruned_names.update(name for group in stage for name in group)
        self.solver.tell_of_experts()
        return layers

    def _task(self, group: Group, gram: HessianAccumulator, drift: DriftAccumulator) -> Task:
        linears = {self.prefix + name: (self.linears[name], self.choices[name]) for name in group}
        return Task(linears, gram, drift, routed=bool(self.expert_of(group[0])))

    def reconstruct(self, ahead: Sequence[nn.Module] = ()) -> float:
        """Train the kept weights so that the block on pruned inputs gives the dense outputs after the blocks `ahead`.

        Those are dense still and follow this one. Returns the held-out loss as a share of what it was.
        """
        with self.solver.timed("reconstruct"):
            result = reconstruct_block(
                self.block,
                list(self.linears),
                training_batches(
                    self.streams.inputs.batches,
                    self.streams.pruned,
                    self._dense_after(ahead),
                    trainers=self.solver.ranks.world,
                ),
                lambda tokens, hidden: self._through(self.index, [self.block, *ahead], tokens, hidden),
                ahead=ahead,
                epochs=self.settings.reconstruct,
                learning_rate=self.settings.learning_rate,
                rounded=self._rounded(),
                trainers=self.solver.ranks,
            )
            for parameter in self.block.parameters():
                parameter.data.copy_(self.solver.as_stored(parameter.data, parameter))
        self.memos = [{} for _ in self.memos]
        if result.diverged:
            self.solver.report.warnings.append(
                f"{self.prefix[:-1]}: reconstruction diverged after {result.best_epoch} good epochs and was rolled "
                "back to the best; lower the learning rate"
            )
        return result.after / result.before if result.before else 1.0

    def _rounded(self) -> dict[str, GridWeight]:
        """The pruned linears whose weights are on grids, which a training leaves them on."""
        return {
            name: GridWeight(self.solver.as_stored(linear.weight.data, linear.weight), grid, self.prefix + name)
            for name, linear in self.linears.items()
            if (grid := self.choices[name].quantize) is not None
        }

    def _dense_after(self, ahead: Sequence[nn.Module]) -> list[Tensor]:
        """The dense stream, which has passed this block, moved on through the blocks that follow."""
        assert self.streams.dense is not None
        if not ahead:
            return self.streams.dense
        batches = zip(self.streams.inputs.batches, self.streams.dense, strict=True)
        moved = (self._through(self.index + 1, ahead, tokens, hidden.to(self.device)) for tokens, hidden in batches)
        home = self.streams.dense[0].device
        return [self.streams.store.keep("ahead", step, hidden.to(home)) for step, hidden in enumerate(moved)]

    def _through(self, first: int, blocks: Sequence[nn.Module], tokens: Tensor, hidden: Tensor) -> Tensor:
        calls = self.streams.inputs.calls(tokens, "training")
        for index, block in enumerate(blocks, first):
            hidden = calls[index].run(block, hidden)
        return hidden

    def run(
        self, call: BlockCall, hidden: Tensor, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the watched submodules and the block's output, for one micro-batch; the output goes home."""
        seen, output = run_watched(self.block, call, hidden.to(self.device), watched, unused)
        return seen, output.to(hidden.device)

    def run_pruned(
        self, step: int, watched: frozenset[str] = frozenset(), unused: Group = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`run` for a micro-batch of the pruned stream; finished submodules, such as attention, compute only once."""
        with remember_outputs(self.block, self._finished(), self.memos[step]):
            return self.run(self.streams.call(step, self.index), self.streams.pruned[step], watched, unused)

    def output(self, step: int) -> Tensor:
        """The finished block's output for a micro-batch; what is remembered serves once more and is let go."""
        memo, self.memos[step] = self.memos[step], {}
        with remember_outputs(self.block, list(memo), memo):
            return self.run(self.streams.call(step, self.index), self.streams.pruned[step])[1]

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
        if not self.linears:
            return []
        call, hidden = self.streams.call(0, self.index), self.streams.pruned[0].to(self.device)
        groups = shared_inputs(
            self.block, self.linears, call, hidden, may_rest=lambda name: self.expert_of(name) is not None
        )
        # Experts that rest are groups of their own, and which rest depends on the rank's windows.
        return self.solver.ranks.gather(groups)[0]

    def move_dense(self, watched: frozenset[str] = frozenset()) -> DenseInputs:
        """Move the dense stream through the block, which must be dense still; keep the inputs of what is watched."""
        assert self.streams.dense is not None
        kept = []
        for step, hidden in enumerate(self.streams.dense):
            seen, output = self.run(self.streams.dense_call(step, self.index), hidden, watched)
            keep = self.streams.store.keep
            kept.append({name: keep(f"dense {name}", step, t.to(hidden.device)) for name, t in seen.items()})
            self.streams.move_dense(step, output)
        return kept

    def _dense_pass(self, stages: list[list[Group]]) -> DenseInputs:
        """Move the dense stream past the block; keep what the corrections will compare."""
        if self.streams.dense is None:
            return []
        compared = [group for stage in stages for group in stage]
        return self.move_dense(frozenset(name for group in compared for name in self._compared(group)))

    def _compared(self, group: Group) -> list[str]:
        """What of the two streams a group's correction compares: its input and, for a projection, the stream's parts.

        Nothing of an expert: the pruned model sends it other tokens than the dense one.
        """
        if self.expert_of(group[0]) or not any(self.choices[name].corrects for name in group):
            return []
        return [group[0], *_parts(self._residual(group))]

    def _residual(self, group: Group) -> Residual | None:
        wanted = len(group) == 1 and self.choices[group[0]].residual_correction > 0
        return self.family.residuals.get(group[0]) if wanted else None

    def _gather(
        self, stage: list[Group], unused: Group, dense_inputs: DenseInputs
    ) -> dict[Group, tuple[HessianAccumulator, DriftAccumulator]]:
        """One pass of all ranks' pruned streams for the inputs of a stage; `unused` linears need not be computed."""
        statistics = {
            group: (
                HessianAccumulator(self.linears[group[0]].in_features, self.device),
                DriftAccumulator(),
            )
            for group in stage
        }
        watched = frozenset(name for group in stage for name in (group[0], *self._compared(group)))
        for step in range(len(self.streams.pruned)):
            pruned, _ = self.run_pruned(step, watched, unused)
            for group, (hessian, drift) in statistics.items():
                if group[0] not in pruned and self.expert_of(group[0]):
                    continue  # no token of this micro-batch was sent to the expert
                hessian.add(pruned[group[0]])
                if self._compared(group):
                    self._add_drift(drift, group, dense_inputs[step], pruned)
        self.solver.ranks.add_up(*(part for pair in statistics.values() for part in pair))
        return statistics

    def _add_drift(
        self, drift: DriftAccumulator, group: Group, dense: dict[str, Tensor], pruned: dict[str, Tensor]
    ) -> None:
        """Compare the two streams at a group's input and, for a projection, at the stream that it is added to."""
        inputs = pruned[group[0]]
        drift.add_inputs(dense[group[0]].to(self.device), inputs)
        residual = self._residual(group)
        if residual is None:
            return
        scale = float(getattr(self.block, residual.multiplier)) if residual.multiplier else 1.0
        dense_stream, pruned_stream = (
            torch.stack([seen[part].to(self.device).float().flatten(0, -2) for part in _parts(residual)]).sum(0) / scale
            for seen in (dense, pruned)
        )
        drift.add_residual(dense_stream, pruned_stream, inputs)


def _parts(residual: Residual | None) -> list[str]:
    """The tensors whose sum is the stream, as `run_watched` names them."""
    if residual is None:
        return []
    return [residual.source, *([f"{residual.plus}()"] if residual.plus else [])]


def _linears_from(last: Group, groups: list[Group]) -> Group:
    """The linears of the group that holds `last`, and of all groups after it: their outputs lead nowhere yet."""
    first = next(index for index, group in enumerate(groups) if last[0] in group)
    return tuple(name for group in groups[first:] for name in group)
