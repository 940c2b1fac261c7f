"""One decoder block on its way from dense to pruned: what reads which input, in which order, under which statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.counting import counting
from sparsegpt.driver.groups import GroupSolver, Task, scaled_grid
from sparsegpt.driver.reports import LayerReport
from sparsegpt.driver.stages import Group, plan_stages, waves
from sparsegpt.model.capture import NOTHING, Behind, BlockCall, Course, follow, remember_outputs, run_watched
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import Residual, prunable_linears
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.streams import Streams
from sparsegpt.recovery.reconstruct import Reconstruction, reconstruct_block
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
        # And the inputs of linears, pruned since, whose outputs will be among those.
        self.kept: list[dict[str, Tensor]] = [{} for _ in streams.pruned]
        self.course = Course()

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
            self.course = self._follow()
            in_waves = waves(self._shared_inputs(), self.expert_of)
            groups = [group for wave in in_waves for group in wave]
            stages = plan_stages(
                in_waves, self.settings.order, lambda name: self.linears[name].in_features, self.expert_of
            )
            dense_inputs = self._dense_pass(stages)
        layers: list[LayerReport] = []
        for number, stage in enumerate(stages):
            # The members of a stage do not feed one another, unless the stage is the whole block.
            idle_from = stage[-1] if self.settings.order == "block" else stage[0]
            with self.solver.timed("capture"):
                idle, later = _linears_from(idle_from, groups), self._all_compared(stages[number + 1 :])
                statistics = self._gather(stage, idle, dense_inputs, later)
            with self.solver.timed("solve"):
                layers += self.solver.prune([self._task(group, *statistics.pop(group)) for group in stage])
            self.pruned_names.update(name for group in stage for name in group)
        self.solver.tell_of_experts()
        return layers

    def _task(self, group: Group, gram: HessianAccumulator, drift: DriftAccumulator) -> Task:
        linears = {self.prefix + name: (self.linears[name], self.choices[name]) for name in group}
        return Task(linears, gram, drift, routed=bool(self.expert_of(group[0])))

    def reconstruct(self, ahead: Sequence[nn.Module] = ()) -> Reconstruction:
        """Train the kept weights so that the block on pruned inputs gives the dense outputs after the blocks `ahead`.

        Those are dense still and follow this one.
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
                counted=counting(self.solver.listener.step, f"training {self.prefix[:-1]}", "steps"),
            )
            for parameter in self.block.parameters():
                parameter.data.copy_(self.solver.as_stored(parameter.data, parameter))
        self.memos, self.kept = [{} for _ in self.memos], [{} for _ in self.kept]
        if result.diverged:
            self.solver.report.warnings.append(
                f"{self.prefix[:-1]}: reconstruction diverged after {result.best_epoch} good epochs and was rolled "
                "back to the best; lower the learning rate"
            )
        return result

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
        self,
        call: BlockCall,
        hidden: Tensor,
        watched: frozenset[str] = frozenset(),
        unused: Group = (),
        behind: Behind = NOTHING,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the watched submodules and the block's output, for one micro-batch; the output goes home."""
        seen, output = run_watched(self.block, call, hidden.to(self.device), watched, unused, behind)
        return seen, output.to(hidden.device)

    def look_at_pruned(self, step: int, watched: frozenset[str], unused: Group, behind: Behind) -> dict[str, Tensor]:
        """Watched inputs in a micro-batch of the pruned stream; finished submodules, as attention, compute once."""
        with remember_outputs(self.block, self._finished(), self._memo(step)):
            return self.run(self.streams.call(step, self.index), self.streams.pruned[step], watched, unused, behind)[0]

    def output(self, step: int) -> Tensor:
        """The finished block's output for a micro-batch; what is remembered serves once more and is let go."""
        memo, self.memos[step] = self._memo(step), {}
        with remember_outputs(self.block, list(memo), memo):
            return self.run(self.streams.call(step, self.index), self.streams.pruned[step])[1]

    def _memo(self, step: int) -> dict[str, Any]:
        """What is remembered of a micro-batch; inputs that were kept have passed their linears."""
        inputs, self.kept[step] = self.kept[step], {}
        for name, tensor in inputs.items():
            output = self.linears[name](tensor.to(self.device))
            self.memos[step][self.course.outlets[name]] = self.course.handed_on(name, output)
        return self.memos[step]

    def _finished(self, about_to_be: Group = ()) -> list[str]:
        """Direct submodules all of whose linears are pruned or about to be.

        A bare linear's output is wide and not worth keeping. None where activations live in files: computing again is
        cheaper than another file. None whose output is changed in place afterwards: it would be with every pass.
        """
        if self.streams.store.scratch is not None:
            return []
        done, pruned = [], self.pruned_names.union(about_to_be)
        for child, module in self.block.named_children():
            inside = {name for name in self.linears if name.startswith(f"{child}.")}
            changed = child in self.course.changed
            if inside and inside <= pruned and not changed and not isinstance(module, nn.Linear):
                done.append(child)
        return done

    def _follow(self) -> Course:
        if not self.linears:
            return Course()
        return follow(self.block, self.streams.call(0, self.index), self.streams.pruned[0].to(self.device))

    def _shared_inputs(self) -> list[Group]:
        """As rank 0 sees them: experts that rest are groups of their own, and which rest depends on the windows."""
        found = self.course.shared_inputs(self.linears, may_rest=lambda name: self.expert_of(name) is not None)
        return self.solver.ranks.gather(found)[0]

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
        return self.move_dense(self._all_compared(stages))

    def _all_compared(self, stages: list[list[Group]]) -> frozenset[str]:
        return frozenset(name for stage in stages for group in stage for name in self._compared(group))

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
        self, stage: list[Group], unused: Group, dense_inputs: DenseInputs, later: frozenset[str]
    ) -> dict[Group, tuple[HessianAccumulator, DriftAccumulator]]:
        """One pass of all ranks' pruned streams for the inputs of a stage; `unused` linears need not be computed.

        Of the dense inputs only what is compared `later` is held on to.
        """
        statistics = {
            group: (
                HessianAccumulator(self.linears[group[0]].in_features, self.device),
                DriftAccumulator(),
            )
            for group in stage
        }
        watched = frozenset(name for group in stage for name in (group[0], *self._compared(group)))
        behind, outlet = self.course.behind(watched, self._finished()), self._outlet(stage)
        for step in range(len(self.streams.pruned)):
            pruned = self.look_at_pruned(step, watched, unused, behind)
            for group, (hessian, drift) in statistics.items():
                if group[0] not in pruned and self.expert_of(group[0]):
                    continue  # no token of this micro-batch was sent to the expert
                hessian.add(pruned[group[0]])
                if self._compared(group):
                    self._add_drift(drift, group, dense_inputs[step], pruned)
            if dense_inputs:
                dense_inputs[step] = {name: tensor for name, tensor in dense_inputs[step].items() if name in later}
            if outlet is not None:
                self.kept[step][outlet] = pruned[outlet].to(self.streams.pruned[step].device)
        self.solver.ranks.add_up(*(part for pair in statistics.values() for part in pair))
        return statistics

    def _outlet(self, stage: list[Group]) -> str | None:
        """The linear of a stage, if its output, once it is pruned, will be that of a finished submodule.

        Its input is kept in the place of the dense one that it is compared with, so that no more memory is needed.
        """
        group = stage[0]
        if len(stage) > 1 or len(group) > 1 or not self._compared(group) or self.streams.store.scratch is not None:
            return None
        child = self.course.outlets.get(group[0])
        return group[0] if child in self._finished(group) else None

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
