"""What block-wise training and whole-model distillation have in common: precision, batches, what is put back after."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sparsegpt.grid import Grid
from sparsegpt.quantization import Integers, grouped, recover, representable

# The share of the windows that judges instead of teaching.
HELD_OUT = 0.1
# Windows are gathered into batches of about this many tokens: small, so that few windows still make many steps.
TOKENS_PER_BATCH = 1024
# Of Adam: for runs of some hundred steps the second moment must forget faster than by the usual 0.999.
BETAS = (0.9, 0.95)


# Tensors [batch, sequence, ...] of the same windows: their tokens first, then what goes in or should come out.
Batch = tuple[Tensor, ...]


class Trainers:
    """Who trains together, each on a part of every batch; here it is one, who has nobody to ask."""

    def average(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """[...] each -> their means over all trainers, None where none has one. like: tensors of their shapes."""
        return list(gradients)

    def mean(self, value: float) -> float:
        """The mean over all trainers of a number."""
        return value


ONE_TRAINER = Trainers()


class GridWeight:
    """A weight [R, C] on a grid in training: its integers stay, its scales [R, G] move.

    weight: in the dtype to which it was rounded. What an optimizer sees are scales times the usual size of an integer:
    a step of Adam then moves the weights about as far as one of their own would.
    Raises SparseGPTError, with the layer's name, where the weight is not on the grid.
    """

    def __init__(self, weight: Tensor, grid: Grid, name: str) -> None:
        self._integers = recover(weight, grid, name)
        steps = self._integers.steps
        self._usual = float(steps.float().square().sum() / steps.count_nonzero().clamp_min(1)) ** 0.5 or 1.0

    def values(self) -> Tensor:
        """What is trained, float32 [R, G], new, as it is at first."""
        return self._integers.scales.scale * self._usual

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Gradient for the weight [R, C] -> that for the values [R, G]."""
        products = grouped(of_weight * self._integers.steps.to(of_weight.device), self._integers.scales.grid)
        return products.sum(-1) / self._usual

    def weight(self, values: Tensor, *, stored: bool = False) -> Tensor:
        """Values [R, G] -> the weight, float32 [R, C]; stored: by scales as files keep them."""
        scale = values / self._usual
        scales = self._integers.scales._replace(scale=representable(scale) if stored else scale)
        return Integers(self._integers.steps.to(values.device), scales).decode()


class TrainingOutOfMemory(torch.OutOfMemoryError):
    """A GPU ran out of memory in `training` ("reconstruction", "distillation") with batches of so many windows."""

    def __init__(self, training: str, windows: int) -> None:
        super().__init__(f"out of memory in {training} with {windows} windows in a step")
        self.training, self.windows = training, windows


@contextmanager
def counting_windows(training: str, batches: Sequence[Batch]) -> Iterator[None]:
    """Work on batches [batch, ...]: an out-of-memory error tells their size, as a larger micro-batch was not to blame.

    Raises TrainingOutOfMemory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingOutOfMemory(training, len(batches[0][0])) from error


def training_batches(tokens: Sequence[Tensor], *others: Sequence[Tensor], trainers: int = 1) -> list[Batch]:
    """Micro-batches [batch, sequence, ...] of the same windows -> a trainer's batches of one step, cut from them."""
    return [
        together
        for micro_batch in zip(tokens, *others, strict=True)
        for size in [_windows_a_step(micro_batch[0], trainers)]
        for together in zip(*(part.split(size) for part in micro_batch), strict=True)
    ]


def _windows_a_step(tokens: Tensor, trainers: int) -> int:
    return max(1, TOKENS_PER_BATCH // tokens.shape[1] // trainers)


def held_out_count(batches: int) -> int:
    """How many of so many batches, the last ones, judge; a single one does both."""
    return max(1, round(HELD_OUT * batches))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 products where the hardware has them, with weights, sums and optimizer in float32; else all float32.

    On a CPU with AVX-512 bf16 an epoch takes 0.4 of the float32 time and reaches the same held-out loss.
    """
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def in_float32(modules: list[nn.Module]) -> Iterator[None]:
    """All parameters and buffers in float32, and in their own dtypes again afterwards."""
    dtypes = [tensor.dtype for tensor in _tensors(modules)]
    for module in modules:
        module.float()  # replaces buffers by new ones
    try:
        yield
    finally:
        for tensor, dtype in zip(_tensors(modules), dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def remembering_gradient_switches(modules: list[nn.Module]) -> Iterator[None]:
    """What asked for gradients before does so again afterwards, and none is left."""
    asked = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)
            parameter.grad = None


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
