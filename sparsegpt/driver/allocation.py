"""How many zeros each layer gets when the target is a fraction: equal shares, or by outliers.

`owl` (Yin et al. 2023, arXiv:2310.05175): a block whose weights |w_ij| ||x_j|| have many outliers, more than
OUTLIER times their layer's mean, is pruned less. Block shares are spread over target +- SPREAD in proportion, then
shifted so that the number of zeros in the whole model is exactly the uniform one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.capture import BlockCall, Course, ModelInputs, follow, run_watched
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.unfuse import unfused
from sparsegpt.sparsity import Sparsity, Unstructured

# Weight shape [out_features, in_features] of each selected linear of a block, by its name inside the block.
Shapes = Mapping[str, tuple[int, int]]
# Brings a block to where it computes for as long as it is needed there.
Visit = Callable[[nn.Module], AbstractContextManager[None]]

OUTLIER = 5.0
SPREAD = 0.08
# Micro-batches that are looked at: norms of a few thousand tokens are enough to rank the blocks.
STEPS = 4


def allocate(
    pattern: Sparsity,
    allocation: str,
    decoder: DecoderModel,
    linears: Sequence[Shapes],
    batches: Sequence[Tensor],
    visit: Visit,
) -> list[dict[str, Sparsity]]:
    """The pattern of each linear, block by block; linears[index]: the selected linears of that block.

    batches: calibration tokens [batch, sequence], the same on every rank.
    Raises SparseGPTError when a share would leave [0, 1), and when there is nothing to spread.
    """
    if allocation == "uniform" or not isinstance(pattern, Unstructured):
        return [dict.fromkeys(block, pattern) for block in linears]
    if not any(linears):
        raise SparseGPTError(f"allocation {allocation!r} has no linear to spread {pattern} over: leave it out")
    outliers = outlier_shares(decoder, linears, batches, visit)
    sizes = [sum(map(math.prod, block.values())) for block in linears]
    shares = block_shares(outliers, sizes, pattern.fraction)
    return _whole_zeros(shares, linears, round(pattern.fraction * sum(sizes)))


def block_shares(outliers: list[float], sizes: list[int], target: float) -> list[float]:
    """Fractions per block within about target +- SPREAD, falling with its outliers, whose weighted mean is target.

    Blocks of size 0 have nothing to prune: they count for nothing and get the target.
    """
    counted = [outlier for outlier, size in zip(outliers, sizes, strict=True) if size]
    low, high = min(counted), max(counted)
    spread = [(high - outlier) / (high - low) * 2 * SPREAD if high > low else 0.0 for outlier in outliers]
    mean = sum(value * size for value, size in zip(spread, sizes, strict=True)) / sum(sizes)
    shares = [target + value - mean if size else target for value, size in zip(spread, sizes, strict=True)]
    if min(shares) < 0 or max(shares) >= 1:
        raise SparseGPTError(
            f"allocation owl cannot meet {target:g}: blocks would get {min(shares):.2f} to {max(shares):.2f} zeros, "
            "expected [0, 1); use uniform allocation",
            settings=("allocation",),
        )
    return shares


@torch.no_grad()
def outlier_shares(
    decoder: DecoderModel, linears: Sequence[Shapes], batches: Sequence[Tensor], visit: Visit
) -> list[float]:
    """Batches [batch, sequence] -> share of weights per block with |w_ij| ||x_j|| > OUTLIER times their layer's mean.

    An expert that nothing is sent to in these few micro-batches has none.
    """
    inputs = ModelInputs(decoder, batches[:STEPS])
    stream, result = inputs.hidden, []
    for index, block in enumerate(decoder.blocks):
        with visit(block), unfused(block):
            calls = [inputs.calls(tokens, "allocation")[index] for tokens in inputs.batches]
            norms, stream = _input_norms(block, list(linears[index]), calls, stream)
            weights = {name: block.get_parameter(f"{name}.weight") for name in linears[index] if name in norms}
            outliers = sum(_outliers(weight, norms[name]) for name, weight in weights.items())
        result.append(outliers / max(1, sum(map(math.prod, linears[index].values()))))
    return result


def _input_norms(
    block: nn.Module, names: list[str], calls: list[BlockCall], stream: list[Tensor]
) -> tuple[Mapping[str, Tensor], list[Tensor]]:
    """Squared norm of every input column of each linear, [C], and the stream after the block."""
    device = next(block.parameters()).device
    expert_of, first = mixture_of(block).expert_of, stream[0].to(device)
    course = follow(block, calls[0], first) if names else Course()
    groups = course.shared_inputs(names, may_rest=lambda name: bool(expert_of(name)))
    squares: dict[str, Tensor] = {}
    outputs = []
    for call, hidden in zip(calls, stream, strict=True):
        seen, output = run_watched(block, call, hidden.to(device), [group[0] for group in groups])
        outputs.append(output.to(hidden.device))
        for name, tensor in seen.items():
            squares[name] = squares.get(name, 0) + tensor.float().flatten(0, -2).square().sum(0)
    return {name: squares[group[0]] for group in groups for name in group if group[0] in squares}, outputs


def _outliers(weight: Tensor, squares: Tensor) -> int:
    saliency = weight.float().abs() * squares.sqrt()
    return int((saliency > OUTLIER * saliency.mean()).sum())


def _whole_zeros(shares: list[float], linears: Sequence[Shapes], total: int) -> list[dict[str, Sparsity]]:
    """Shares as whole numbers of zeros per linear that add up to `total`: rounding errors are carried along."""
    result: list[dict[str, Sparsity]] = []
    wanted, given = 0.0, 0
    left = sum(map(len, linears))  # the last one takes what rounding left over
    for share, block in zip(shares, linears, strict=True):
        patterns: dict[str, Sparsity] = {}
        for name, shape in block.items():
            size = math.prod(shape)
            left -= 1
            wanted += share * size
            zeros = (round(wanted) if left else total) - given
            given += zeros
            patterns[name] = Unstructured(zeros / size)
        result.append(patterns)
    assert given == total, f"allocated {given} zeros, expected {total}"
    return result
