"""Inputs of linears scaled channel by channel before a block is rounded (AWQ, Lin et al. 2023, arXiv:2306.00978).

    W -> W diag(s),   and what comes before makes x / s

which changes nothing that the block computes; but a grid is finer where the inputs are large. With a_c the mean
absolute input of channel c, s_c = a_c^alpha over the root of the largest times the least, and alpha is the one whose
weights lose least by rounding to nearest. What comes before can be

    a norm            its gain and bias take 1 / s, where all its readers are known
    the values        their rows of the linear that makes them take 1 / s, for all heads of a key-value head together
    up of a gated MLP its rows take 1 / s, as they are multiplied with the gate after it

Dimension key: R out_features, C in_features, G key-value heads, H heads, F values of a head.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from sparsegpt.grid import Grid
from sparsegpt.quantization import encode, search_scales
from sparsegpt.rotation.rotatable import Rotatable, ValueHeads
from sparsegpt.solvers.hessian import HessianAccumulator
from sparsegpt.solvers.refit import row_losses

# Shares of the activations' exponent that are tried; 0 leaves the inputs as they are.
ALPHAS = tuple(share / 10 for share in range(11))
# Less than any mean absolute input that counts.
LEAST_INPUT = 1e-4
# down(act(gate(x)) * up(x)), by the names of the linears in one module. Inputs of experts stay as they are.
_GATED, _EXPERT = re.compile(r"(.+\.)?down_proj"), re.compile(r"\.experts?\.")
# Of these the up projection is not multiplied as it is.
_NOT_GATED = ("gpt_oss",)


@dataclass(frozen=True)
class Place:
    """Matrices of a block with one input, by their names inside it, and what can take the inverse of its scales.

    watched: the submodule at whose input it is seen. divide: makes what comes before give x / s, in place. tie: turns
    what is wished for each channel, [C], into scales that can be had.
    """

    readers: dict[str, nn.Module]
    watched: str
    divide: Callable[[Tensor], None]
    tie: Callable[[Tensor], Tensor] = lambda wished: wished

    @torch.no_grad()
    def scale(self, scale_C: Tensor) -> None:
        """Scale the input by 1 / s and its readers by s [C], in place."""
        self.divide(scale_C)
        for reader in self.readers.values():
            assert isinstance(reader.weight, Tensor)
            reader.weight.data.mul_(scale_C.to(reader.weight))


class InputStatistics:
    """Of the inputs [..., C] of a place: the Hessian, and the mean absolute input of each channel."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._hessian, self._sum_C = HessianAccumulator(width, device), torch.zeros(width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs of any float dtype."""
        self._hessian.add(inputs)
        self._sum_C += inputs.detach().float().abs().flatten(0, -2).sum(0)

    def over(self, total: Callable[[Tensor], Tensor]) -> None:
        """Become the sum of what several have gathered. total: [...] -> the sum of theirs, in the same memory."""
        self._hessian.over(total)
        total(self._sum_C)

    def scales(self, linears: Sequence[tuple[Tensor, Grid]], tie: Callable[[Tensor], Tensor]) -> Tensor:
        """Weights [R, C] with their grids -> the scales [C] with which they lose least by rounding to nearest."""
        return find_scales(linears, self._hessian.take(), self._sum_C / max(1, self._hessian.tokens), tie)


def find_scales(
    linears: Sequence[tuple[Tensor, Grid]],
    hessian: Tensor,
    magnitude: Tensor,
    tie: Callable[[Tensor], Tensor] = lambda wished: wished,
) -> Tensor:
    """Weights [R, C] with their grids, Hessian [C, C], mean absolute inputs [C] -> scales [C] of the best of ALPHAS."""
    base_C = tie(magnitude.clamp_min(LEAST_INPUT))
    found, least = torch.ones_like(base_C), float("inf")
    for alpha in ALPHAS:
        scale_C = base_C.pow(alpha)
        scale_C = scale_C / (scale_C.max() * scale_C.min()).sqrt()
        loss = sum(_loss(weight.float(), grid, hessian, scale_C) for weight, grid in linears)
        if loss < least:
            found, least = scale_C, loss
    return found


def places(model: Rotatable, block: nn.Module) -> Iterator[Place]:
    """Inside `unfused`: the inputs of a block that can be scaled."""
    # Where the stream itself is what leaves a norm, more reads it than linears.
    for norm, readers in () if model.no_stream else model.readers(block):
        module = block.get_submodule(norm)
        if isinstance(getattr(module, "weight", None), Tensor):
            # An expert sees some of the tokens alone, whatever stands beside it all of them.
            watched = min(readers, key=lambda name: bool(_EXPERT.search(name)))
            yield Place(readers, watched, _norm_divider(module, model.layout.unit))
    heads = None if model.no_values else model.value_heads(block)
    if heads is not None:
        name = _name_of(block, heads.output)
        yield Place({name: heads.output}, name, _values_divider(heads), _values_tie(heads))
    yield from _gated_places(model, block)


def _gated_places(model: Rotatable, block: nn.Module) -> Iterator[Place]:
    """Each `down` whose input is made by a gate and an `up` beside it."""
    if getattr(model.decoder.model.config.get_text_config(), "model_type", "") in _NOT_GATED:
        return
    for name, down in block.named_modules():
        if not _GATED.fullmatch(name) or _EXPERT.search(name) or not isinstance(down, nn.Linear):
            continue
        beside = dict(block.get_submodule(name.rpartition(".")[0]).named_children())
        up, gate = beside.get("up_proj"), beside.get("gate_proj")
        if isinstance(up, nn.Linear) and isinstance(gate, nn.Linear):
            yield Place({name: down}, name, _rows_divider(up))


def _loss(weight: Tensor, grid: Grid, hessian: Tensor, scale_C: Tensor) -> float:
    """What is lost by rounding W diag(s) to nearest, for the inputs x / s."""
    scaled_RC = weight * scale_C
    scales = search_scales(scaled_RC, grid, importance=hessian.diagonal() / scale_C.square())
    return float(row_losses(weight - encode(scaled_RC, scales).decode() / scale_C, hessian).sum())


def _norm_divider(norm: nn.Module, unit: float) -> Callable[[Tensor], None]:
    """unit: what the norm's weight is where it does nothing."""

    def divide(scale_C: Tensor) -> None:
        assert isinstance(norm.weight, Tensor)
        weight, scale = norm.weight.data, scale_C.to(norm.weight)
        weight.copy_((weight - unit + 1) / scale + unit - 1)
        if isinstance(getattr(norm, "bias", None), Tensor):
            norm.bias.data.div_(scale)  # type: ignore[operator]

    return divide


def _rows_divider(linear: nn.Linear) -> Callable[[Tensor], None]:
    def divide(scale_C: Tensor) -> None:
        for parameter in linear.parameters():
            parameter.data.div_(scale_C.to(parameter).view(-1, *[1] * (parameter.ndim - 1)))

    return divide


def _values_divider(heads: ValueHeads) -> Callable[[Tensor], None]:
    def divide(scale_C: Tensor) -> None:
        scale_GF = scale_C.view(heads.groups, -1, heads.width)[:, 0]
        for parameter in (heads.source.weight, getattr(heads.source, "bias", None)):
            if isinstance(parameter, Tensor):
                rows = heads.rows(parameter)
                rows.div_(scale_GF.to(rows).view(*scale_GF.shape, *[1] * (rows.ndim - 2)))

    return divide


def _values_tie(heads: ValueHeads) -> Callable[[Tensor], Tensor]:
    """The heads of a key-value head read the same values: their mean."""

    def tie(wished_C: Tensor) -> Tensor:
        sizes = {"g": heads.groups, "f": heads.width}
        mean_GF = reduce(wished_C, "(g h f) -> g f", "mean", **sizes)
        return repeat(mean_GF, "g f -> (g h f)", h=len(wished_C) // mean_GF.numel())

    return tie


def _name_of(block: nn.Module, wanted: nn.Module) -> str:
    found: str = next(name for name, module in block.named_modules() if module is wanted)
    return found
