"""Whole-model distillation: train the kept weights of all blocks until the model predicts what the dense one does.

A block that gives its dense outputs on average may still be wrong where it matters. Here the loss is what the model
says: the Kullback-Leibler divergence of its next-token distribution from the dense model's (Hinton et al. 2015,
arXiv:1503.02531, at temperature 1). The masks stay fixed; norms and biases inside the blocks move too.

The dense distributions come from the dense stream, which has reached the end of the model by then. One block at a time
computes: a step keeps the hidden states between blocks, then goes from the last block to the first, computes each
once more (Chen et al. 2016, arXiv:1604.06174) and takes its Adam step at once, so gradients exist for one block only.
The whole training keeps weights in float32 and two moments of them: 12 bytes a trained weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegpt.counting import Counted, unheard
from sparsegpt.grid import Grid
from sparsegpt.model.capture import BlockCall, ModelInputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.head import logits_after
from sparsegpt.model.residence import Residence
from sparsegpt.model.streams import ActivationStore
from sparsegpt.model.unfuse import unfused
from sparsegpt.recovery.training import (
    BETAS,
    ONE_TRAINER,
    Batch,
    GridWeight,
    Trainers,
    autocast,
    held_out_count,
    in_float32,
    remembering_gradient_switches,
)

EPSILON = 1e-8
# The rate climbs over the first sixteenth of the steps, while Adam's second moments are still guesses.
WARM_UP = 1 / 16
# Rows of logits that are in float32 at a time.
ROWS = 256


class Trained(NamedTuple):
    """A parameter in training, [...] three times, in float32: its values, Adam's first and second moment."""

    weight: Tensor
    mean: Tensor
    square: Tensor


class Distiller:
    """The pruned model as a student, of which one block computes at a time.

    Its batches pair tokens [batch, sequence] with the dense model's hidden states [batch, sequence, features] after the
    last block. pruned: for each block that is trained, the names of its pruned linears, whose zeros stay zeros. grids:
    of those among them whose integers stay too, and whose scales are trained. trainers: who trains the same student at
    the same time, each on batches of its own. The states lie on the device of the blocks' parameters, in files if the
    store keeps activations there.
    """

    def __init__(
        self,
        decoder: DecoderModel,
        inputs: ModelInputs,
        residence: Residence,
        store: ActivationStore,
        pruned: Mapping[int, Sequence[str]],
        grids: Mapping[int, Mapping[str, Grid]] | None = None,
        trainers: Trainers = ONE_TRAINER,
    ) -> None:
        self.decoder, self.blocks = decoder, decoder.blocks
        self.inputs, self.residence, self.trainers = inputs, residence, trainers
        self.masked = {index: {f"{name}.weight" for name in names} for index, names in pruned.items()}
        self.rounded: dict[int, dict[str, GridWeight]] = {}
        self.states: dict[int, dict[str, Trained]] = {}
        for index in pruned:
            block = self.blocks[index]
            home = next(block.parameters()).device
            with residence.visit(block), unfused(block):
                self.rounded[index] = {
                    f"{name}.weight": _on_grid(block, f"{name}.weight", grid, decoder.prefix(index), residence)
                    for name, grid in (grids or {}).get(index, {}).items()
                }
                self.states[index] = {
                    name: Trained(
                        *(
                            store.keep(f"{part} of {index}.{name}", 0, values.to(home))
                            for part, values in _initial(self._first_values(index, name, parameter))
                        )
                    )
                    for name, parameter in block.named_parameters()
                    if name in self.masked[index] or parameter.ndim == 1
                }

    def _first_values(self, index: int, name: str, parameter: nn.Parameter) -> Tensor:
        rounded = self.rounded[index].get(name)
        return parameter.data if rounded is None else rounded.values()

    def _value(self, index: int, name: str, *, stored: bool = False) -> Tensor:
        """A parameter [...] as it is in training, or as it will be stored."""
        values, rounded = self.states[index][name].weight, self.rounded[index].get(name)
        return values if rounded is None else rounded.weight(values, stored=stored)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, [...] each, by name; writing into these tensors sets it."""
        return {
            f"{index}.{name}.{part}": tensor
            for index, states in self.states.items()
            for name, state in states.items()
            for part, tensor in state._asdict().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """[...] each, by name: take up the values that `tensors` had after an epoch; without any, begin anew."""
        for name, tensor in self.tensors().items() if tensors else ():
            tensor.copy_(tensors[name])

    def step(self, batch: Batch, number: int, rate: float) -> None:
        """[batch, sequence], [batch, sequence, features]: step `number` (from 1) of Adam on all trained parameters."""
        tokens, dense = batch
        entered = list(self._forward(tokens))
        gradient = self._compare(tokens, entered.pop(), dense)[1]
        for index in range(len(self.blocks) - 1, min(self.states) - 1, -1):
            call = self.inputs.calls(tokens, "training")[index]
            gradient = self._backward(index, call, entered[index], gradient, number, rate)

    @torch.no_grad()
    def loss(self, batches: list[Batch]) -> float:
        """Batches as in `step`: [batch, sequence], [batch, sequence, features] -> mean divergence in nats a token."""
        total = 0.0
        for tokens, dense in batches:
            *_, hidden = self._forward(tokens)
            total += tokens.numel() * self._compare(tokens, hidden, dense, with_gradient=False)[0]
        return self.trainers.mean(total / sum(tokens.numel() for tokens, _ in batches))

    @torch.no_grad()
    def hidden_after(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] -> the student's hidden states after its last block, [batch, sequence, features]."""
        *_, hidden = self._forward(tokens)
        return hidden

    @torch.no_grad()
    def finished(self, index: int) -> dict[str, Tensor]:
        """The tensors [...] of a trained block by name, as they are stored."""
        block = self.blocks[index]
        with self.residence.visit(block):
            with unfused(block):
                for name in self.states[index]:
                    parameter = block.get_parameter(name)
                    values = self._value(index, name, stored=True).to(parameter.dtype)
                    parameter.data.copy_(self.residence.as_stored(values, parameter))
            return self.residence.to_store(block)

    @torch.no_grad()
    def _forward(self, tokens: Tensor) -> Iterator[Tensor]:
        """The hidden states before each block, and those after the last, in float32."""
        hidden = self.inputs.enter(tokens).float()
        yield hidden
        calls = self.inputs.calls(tokens, "training")
        for index, block in enumerate(self.blocks):
            with self._at_work(index), autocast(_device(block)):
                hidden = calls[index].run(block, hidden.to(_device(block))).float()
            yield hidden

    @torch.enable_grad()
    def _compare(
        self, tokens: Tensor, hidden: Tensor, dense: Tensor, *, with_gradient: bool = True
    ) -> tuple[float, Tensor]:
        """The divergence at the model's end, and its gradient for the hidden states after the last block."""
        leaf = hidden.to(self.residence.dtype).requires_grad_(with_gradient)
        with self.residence.staying():
            with autocast(leaf.device):
                logits = logits_after(self.decoder, tokens, leaf)
                with torch.no_grad():
                    wanted = logits_after(self.decoder, tokens, dense)
            loss, gradient = divergence(logits.detach(), wanted)
            if not with_gradient:
                return loss, gradient
            return loss, torch.autograd.grad(logits, leaf, gradient)[0]

    def _backward(
        self, index: int, call: BlockCall, hidden: Tensor, gradient: Tensor, number: int, rate: float
    ) -> Tensor:
        """Step the block's parameters; returns the gradient for its inputs."""
        with self._at_work(index) as trained, torch.enable_grad():
            block = self.blocks[index]
            leaf = hidden.to(_device(block)).requires_grad_(True)
            with autocast(leaf.device):
                output = call.run(block, leaf)
            gradient = gradient.to(output.device, output.dtype)
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                output, [leaf, *trained.values()], gradient, allow_unused=True
            )
        for name, of_parameter in zip(trained, self.trainers.average(found[1:], list(trained.values())), strict=True):
            if of_parameter is None:
                continue  # an expert to which nothing was sent
            state = self.states[index][name]
            change = of_parameter.to(state.weight.device, torch.float32)
            if name in self.rounded[index]:
                change = self.rounded[index][name].gradient(change)
            elif name in self.masked[index]:
                change = change.masked_fill(state.weight == 0, 0)  # Adam then never moves a zero
            adam_step(state, change, number, rate)
        assert found[0] is not None
        return found[0]

    @contextmanager
    def _at_work(self, index: int) -> Iterator[dict[str, nn.Parameter]]:
        """The block with the values of the training; gives the parameters that it trains."""
        block = self.blocks[index]
        with self.residence.visit(block), unfused(block), in_float32([block]), remembering_gradient_switches([block]):
            block.requires_grad_(False)
            trained = {name: block.get_parameter(name) for name in self.states.get(index, ())}
            originals = [parameter.data for parameter in trained.values()]
            for name, parameter in trained.items():
                parameter.data = self._value(index, name).to(parameter.device)
                parameter.requires_grad_(True)
            try:
                yield trained
            finally:
                for parameter, original in zip(trained.values(), originals, strict=True):
                    parameter.data = original


def distill(
    distiller: Distiller,
    batches: list[Batch],
    epochs: int,
    rate: float,
    known: Sequence[float],
    counted: Counted = unheard,
) -> Iterator[tuple[int, float]]:
    """Batches as in `Distiller.step`, [batch, ...] -> each epoch with its held-out loss in nats a token.

    Epoch 0 is before the first step. known: the losses of the epochs that are finished already, after which the
    training goes on; `distiller` holds their weights. A tenth of the batches is held out and judges. counted: is told
    of every step.
    """
    held_out = batches[-held_out_count(len(batches)) :]
    training = batches[: -len(held_out)] or held_out
    losses, steps = list(known), epochs * len(training)
    counted(max(0, len(losses) - 1) * len(training), steps)
    if not losses:
        losses.append(distiller.loss(held_out))
        yield 0, losses[0]
    for epoch in range(len(losses), epochs + 1):
        if not math.isfinite(losses[-1]):
            return
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(epoch))
        for index, chosen in enumerate(order.tolist()):
            number = (epoch - 1) * len(training) + index + 1
            distiller.step(training[chosen], number, rate * _schedule(number, steps))
            counted(number, steps)
        losses.append(distiller.loss(held_out))
        yield epoch, losses[-1]


def divergence(logits: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Logits, wanted [batch, sequence, vocabulary] -> KL(wanted || logits) in nats and its gradient for the logits.

    The divergence is the mean over tokens; the gradient has the logits' shape. For one token it is the difference of
    the two distributions.
    """
    gradient, total = torch.empty_like(logits), 0.0
    rows = logits.shape[:-1].numel()
    flat = (tensor.reshape(rows, -1).split(ROWS) for tensor in (logits, wanted, gradient))
    for ours, theirs, part in zip(*flat, strict=True):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        q = log_q.exp()
        # What both rule out (padding of the vocabulary) has minus infinity on both sides, and adds nothing.
        total += float((q * (log_q - log_p)).masked_fill_(q == 0, 0).sum())
        part.copy_(log_p.exp_().sub_(q).div_(rows))
    return total / rows, gradient


def adam_step(state: Trained, gradient: Tensor, number: int, rate: float) -> None:
    """[...] each: step `number` (from 1) of Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1), in place."""
    first, second = BETAS
    state.mean.lerp_(gradient, 1 - first)
    state.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    # Both moments start at 0 and are divided by what that took from them.
    root = (state.square / (1 - second**number)).sqrt_().add_(EPSILON)
    state.weight.addcdiv_(state.mean, root, value=-rate / (1 - first**number))


def _on_grid(block: nn.Module, name: str, grid: Grid, prefix: str, residence: Residence) -> GridWeight:
    parameter = block.get_parameter(name)
    return GridWeight(residence.as_stored(parameter.data, parameter), grid, prefix + name)


def _initial(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "weight", values.to(torch.float32, copy=True)
    for moment in ("mean", "square"):
        yield moment, torch.zeros_like(values, dtype=torch.float32)


def _schedule(number: int, steps: int) -> float:
    """Share of the learning rate in step `number` (from 1): up at first, then down to 0 along a cosine."""
    return min(1.0, number / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))


def _device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device
