"""Block reconstruction: train a pruned block's kept weights so that, on pruned inputs, it gives the dense outputs.

After the closed-form solves each layer is optimal for itself; a few epochs of Adam let the layers of a block help one
another. The masks stay fixed; norms and biases move too. A tenth of the calibration windows is held out: the weights
with the lowest held-out loss win, the untrained ones included, so no block gets worse.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsegpt.capture import BlockCall

HELD_OUT = 0.1
# Windows are gathered into batches of about this many tokens: small, so that few windows still make many steps.
TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Reconstruction:
    """Held-out loss before and after, and after how many epochs the best weights were met (0: never)."""

    before: float
    after: float
    best_epoch: int
    diverged: bool


@torch.enable_grad()
def reconstruct_block(
    block: nn.Module,
    pruned_linears: list[str],
    inputs: list[Tensor],
    targets: list[Tensor],
    call_for: Callable[[int], BlockCall],
    *,
    epochs: int,
    learning_rate: float,
) -> Reconstruction:
    """Train `block` in place.

    pruned_linears: names inside the block, whose zeros stay zeros. inputs, targets: micro-batches
    [batch, sequence, features] of the pruned stream before and the dense stream behind the block. call_for(size):
    the block's other arguments for a batch of so many windows. Adam with the learning rate falling to 0 along a
    cosine; weights in float32, products in bfloat16 where the hardware has them. If the loss stops being finite the
    block is rolled back.
    """
    device = next(block.parameters()).device
    dtypes = {name: tensor.dtype for name, tensor in _tensors(block)}
    block.float()
    masks = {f"{name}.weight": block.get_parameter(f"{name}.weight") != 0 for name in pruned_linears}
    trained = {name: p for name, p in block.named_parameters() if name in masks or p.ndim == 1}
    batches = _batches(inputs, targets)
    held_out = batches[-max(1, round(HELD_OUT * len(batches))) :]
    training = batches[: -len(held_out)] or held_out
    steps = epochs * len(training)
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(0)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden, target = (tensor.to(device, torch.float32) for tensor in batch)
        with _autocast(device):
            output = call_for(len(hidden)).run(block, hidden)
        return relative_loss(output.float(), target)

    before = best = _mean_loss(loss_of, held_out)
    best_state, best_epoch, diverged = _copy(trained), 0, False
    with _frozen_except(block, trained):
        for epoch in range(1, epochs + 1):
            for place in torch.randperm(len(training), generator=generator).tolist():
                loss = loss_of(training[place])
                optimizer.zero_grad()
                loss.backward()
                for name, mask in masks.items():
                    gradient = trained[name].grad
                    assert gradient is not None
                    gradient.masked_fill_(~mask, 0)  # Adam then never moves a zero
                optimizer.step()
                schedule.step()
            after = _mean_loss(loss_of, held_out)
            if not math.isfinite(after):
                diverged = True
                break
            if after < best:
                best, best_state, best_epoch = after, _copy(trained), epoch
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best_state[name])
        for name, tensor in _tensors(block):
            tensor.data = tensor.data.to(dtypes[name])
    return Reconstruction(before, best, best_epoch, diverged)


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2, for [batch, sequence, features].

    Relative, because a few tokens of most models carry activations hundreds of times larger than all others: their
    plain squared error would be all that the training sees.
    """
    error = (output - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)).mean()


def _batches(inputs: list[Tensor], targets: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches cut into training batches of about TOKENS_PER_BATCH tokens."""
    windows = max(1, TOKENS_PER_BATCH // inputs[0].shape[1])
    return [
        pair
        for hidden, target in zip(inputs, targets, strict=True)
        for pair in zip(hidden.split(windows), target.split(windows), strict=True)
    ]


@torch.no_grad()
def _mean_loss(loss_of: Callable[[tuple[Tensor, Tensor]], Tensor], batches: list[tuple[Tensor, Tensor]]) -> float:
    return sum(float(loss_of(batch)) for batch in batches) / len(batches)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 products where the hardware has them, with weights, sums and optimizer in float32; else all float32.

    On a CPU with AVX-512 bf16 an epoch takes 0.4 of the float32 time and reaches the same held-out loss.
    """
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def _frozen_except(block: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the trained parameters alone; what asked for gradients before does so again afterwards."""
    asked = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    try:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(asked[name])
            parameter.grad = None
