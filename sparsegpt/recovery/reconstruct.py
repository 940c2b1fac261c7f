"""Block reconstruction: train a pruned block's kept weights so that, on pruned inputs, it gives the dense outputs.

After the closed-form solves each layer is optimal for itself; a few epochs of Adam let the layers of a block help one
another. The outputs may be compared some dense blocks further on, where those of its errors that the model amplifies
weigh more. The masks stay fixed; norms and biases move too. A tenth of the calibration windows is held out: the weights
with the lowest held-out loss win, the untrained ones included, so no block gets worse.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegpt.counting import Counted, unheard
from sparsegpt.recovery.training import (
    BETAS,
    ONE_TRAINER,
    Batch,
    GridWeight,
    Trainers,
    autocast,
    counting_windows,
    held_out_count,
    in_float32,
    remembering_gradient_switches,
)


@dataclass(frozen=True)
class Reconstruction:
    """Held-out loss before and after, and after how many epochs the best weights were met (0: never).

    losses: held out, before the first epoch and after each.
    """

    before: float
    after: float
    best_epoch: int
    diverged: bool
    losses: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """The loss after as a share of the loss before."""
        return self.after / self.before if self.before else 1.0


@torch.enable_grad()
def reconstruct_block(
    block: nn.Module,
    pruned_linears: list[str],
    batches: list[Batch],
    forward: Callable[[Tensor, Tensor], Tensor],
    *,
    ahead: Sequence[nn.Module] = (),
    epochs: int,
    learning_rate: float,
    rounded: Mapping[str, GridWeight] | None = None,
    trainers: Trainers = ONE_TRAINER,
    counted: Counted = unheard,
) -> Reconstruction:
    """Batches [batch, sequence, ...] -> held-out losses; trains `block` in place.

    pruned_linears: names inside the block, whose zeros stay zeros. batches: tokens [batch, sequence], the pruned stream
    before the block [batch, sequence, features], and what should become of it. forward(tokens, hidden): what the block
    and the modules `ahead`, which are not trained, make of it. Adam with the learning rate falling to 0 along a cosine;
    weights in float32, products in bfloat16 where the hardware has them. If the loss stops being finite the block is
    rolled back. rounded: weights whose integers stay, of which the scales are trained, by their linears' names.
    trainers: who trains the same block at the same time, each on batches of its own. counted: is told of
    every step.
    """
    device = next(block.parameters()).device
    with in_float32([block, *ahead]), remembering_gradient_switches([block, *ahead]):
        masks = {f"{name}.weight": block.get_parameter(f"{name}.weight") != 0 for name in pruned_linears}
        trained = {name: p for name, p in block.named_parameters() if name in masks or p.ndim == 1}
        for module in (block, *ahead):
            module.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)

        def loss_of(batch: Batch) -> Tensor:
            tokens, *streams = batch
            hidden, target = (tensor.to(device, torch.float32) for tensor in streams)
            with autocast(device):
                output = forward(tokens, hidden)
            return relative_loss(output.float(), target)

        with counting_windows("reconstruction", batches):
            by_weight = {f"{name}.weight": weight for name, weight in (rounded or {}).items()}
            leaves = _Leaves(trained, masks, by_weight)
            return _train(leaves, batches, loss_of, epochs, learning_rate, trainers, counted)


class _Leaves:
    """What the optimizer moves: parameters themselves, zeros excepted, and of rounded ones the scales."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor], rounded: dict[str, GridWeight]
    ) -> None:
        self.parameters, self.masks, self.rounded = parameters, masks, rounded
        self.leaves = {
            name: nn.Parameter(rounded[name].values().to(parameter.device)) if name in rounded else parameter
            for name, parameter in parameters.items()
        }

    def take_gradients(self, trainers: Trainers) -> None:
        """After a backward pass: the trainers' mean gradients; those of zeros go, of rounded weights come scales'."""
        parameters = list(self.parameters.values())
        means = trainers.average([parameter.grad for parameter in parameters], parameters)
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is None:
                continue  # an expert may get no token in a batch
            if name in self.rounded:
                self.leaves[name].grad = self.rounded[name].gradient(gradient)
                self.parameters[name].grad = None
            else:
                gradient.masked_fill_(~mask, 0)  # Adam then never moves a zero

    @torch.no_grad()
    def show(self, *, stored: bool = False) -> None:
        """Give the block the weights of the scales as they are now; stored: as files keep them."""
        for name, weight in self.rounded.items():
            self.parameters[name].copy_(weight.weight(self.leaves[name].detach(), stored=stored))


def _train(
    trained: _Leaves,
    batches: list[Batch],
    loss_of: Callable[[Batch], Tensor],
    epochs: int,
    learning_rate: float,
    trainers: Trainers,
    counted: Counted,
) -> Reconstruction:
    """Leave those values in the trained parameters whose held-out loss was the lowest."""
    held_out = batches[-held_out_count(len(batches)) :]
    training = batches[: -len(held_out)] or held_out
    steps, done = epochs * len(training), 0
    counted(done, steps)
    optimizer = torch.optim.Adam(trained.leaves.values(), lr=learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(0)
    before = best = trainers.mean(_mean_loss(loss_of, held_out))
    best_state, best_epoch, diverged, losses = _copy(trained.leaves), 0, False, [before]
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(len(training), generator=generator).tolist():
            loss = loss_of(training[index])
            optimizer.zero_grad()
            loss.backward()
            trained.take_gradients(trainers)
            optimizer.step()
            trained.show()
            schedule.step()
            done += 1
            counted(done, steps)
        after = trainers.mean(_mean_loss(loss_of, held_out))
        losses.append(after)
        if not math.isfinite(after):
            diverged = True
            break
        if after < best:
            best, best_state, best_epoch = after, _copy(trained.leaves), epoch
    with torch.no_grad():
        for name, leaf in trained.leaves.items():
            leaf.copy_(best_state[name])
    trained.show(stored=True)
    return Reconstruction(before, best, best_epoch, diverged, tuple(losses))


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """[batch, sequence, features] twice -> mean over tokens of ||output - target||^2 / ||target||^2, a scalar.

    Relative, because a few tokens of most models carry activations hundreds of times larger than all others: their
    plain squared error would be all that the training sees.
    """
    error = (output - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)).mean()


@torch.no_grad()
def _mean_loss(loss_of: Callable[[Batch], Tensor], batches: list[Batch]) -> float:
    return sum(float(loss_of(batch)) for batch in batches) / len(batches)


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
