"""Mixtures of experts as transformers keeps them: the weights of all experts in one 3-D parameter a projection.

    up    gate_up_proj [E, 2 I, H], or up_proj [E, I, H] without a gate      biases, if any: <name>_bias [E, out]
    down  down_proj    [E, H, I]                                            transposed: [E, in, out] instead

Here stands what everybody who takes the experts apart must know: the form of such a module, what its experts compute
between the two projections, and how tokens reach them. Rarer forms are told here too, and GPT-2's Conv1D, the other
linear in disguise:

    parallel  one projection of all experts in `weight` [E, out, in], called with tokens sorted by expert (JetMoE)
    stacked   w1, v1, w2 [E I, H], of which w2 is transposed (DBRX)

Dimension key: E experts, H hidden width, I width inside an expert, T tokens, K experts a token."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError

DOWN = "down_proj"


@dataclass(frozen=True)
class FusedExperts:
    """The form of a module of experts.

    count: experts. up: "gate_up_proj", or "up_proj" without a gate. transposed: weights are [E, in, out]. biased: each
    projection has a parameter <name>_bias [E, out]. more: experts after these that give their inputs back.
    """

    count: int
    up: str
    transposed: bool
    biased: bool
    more: int = 0

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two parameters, in the order in which tokens pass them."""
        return self.up, DOWN


def fused_experts(name: str, experts: nn.Module) -> FusedExperts:
    """The form of a module that holds 3-D parameters; SparseGPTError, with `name`, for one that is not known."""
    own = dict(experts.named_parameters())
    up = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    biases = {f"{up}_bias", f"{DOWN}_bias"}
    if not {up, DOWN} <= own.keys() <= {up, DOWN} | biases:
        raise SparseGPTError(
            f"{name}: expected experts with gate_up_proj (or up_proj) and down_proj in {type(experts).__name__}, "
            f"found {', '.join(own)}: weights of this form cannot be pruned"
        )
    if len(own[up]) != len(own[DOWN]):
        raise SparseGPTError(
            f"{name}: expected as many experts in {up} as in {DOWN} of {type(experts).__name__}, found {len(own[up])} "
            f"and {len(own[DOWN])}: weights of this form cannot be pruned"
        )
    transposed = _is_transposed(experts, own[up], own[DOWN], gated=up == "gate_up_proj")
    return FusedExperts(len(own[DOWN]), up, transposed, biased=biases <= own.keys())


def with_identities(experts: nn.Module) -> FusedExperts | None:
    """The form of experts of which the last ones have rows in up but none in down, and compute nothing (LongCat)."""
    own = dict(experts.named_parameters())
    if own.keys() != {"gate_up_proj", DOWN} or not hasattr(experts, "identity_expert"):
        return None
    count, more = len(own[DOWN]), len(own["gate_up_proj"]) - len(own[DOWN])
    return FusedExperts(count, "gate_up_proj", transposed=False, biased=False, more=more) if more > 0 else None


def activate(experts: Any, form: FusedExperts, hidden: Tensor) -> Tensor:
    """What stands between the projections: hidden [T, 2 I], or [T, I] without a gate, to [T, I]."""
    if form.up == "up_proj":
        activated = experts.act_fn(hidden)
    elif hasattr(experts, "_apply_gate"):
        activated = experts._apply_gate(hidden)
    else:
        gate, up = hidden.chunk(2, dim=-1)
        activated = experts.act_fn(gate) * up
    return activated  # type: ignore[no-any-return]


def run_experts(
    expert: Callable[[int, Tensor], Tensor], count: int, hidden_states: Tensor, *routing: Any, **named_routing: Any
) -> Tensor:
    """The sum over each token's experts; an expert that no token is sent to is not called.

    expert: (which, inputs [t, H]) -> outputs [t, H]. hidden_states: [T, H], with each token's experts and their shares
    [T, K] as routing; without routing [E * T, H], expert by expert (Llama 4).
    """
    if not routing and not named_routing:
        return _run_sorted(expert, count, hidden_states)
    chosen, shares = (*routing, *named_routing.values())
    result = torch.zeros_like(hidden_states)
    for index in chosen.unique().tolist():
        if index < count:  # with experts on several machines, those elsewhere have the number `count`
            token, rank = torch.where(chosen == index)
            outputs = expert(index, hidden_states[token]) * shares[token, rank, None]
            result.index_add_(0, token, outputs.to(result.dtype))
    return result


def _run_sorted(expert: Callable[[int, Tensor], Tensor], count: int, hidden_states: Tensor) -> Tensor:
    """Every expert is given every token, multiplied by 0 where it was not chosen."""
    parts = hidden_states.view(count, -1, hidden_states.shape[-1])
    result = torch.zeros_like(parts)
    for index in range(count):
        (token,) = torch.where(parts[index].any(-1))
        if len(token):
            result[index, token] = expert(index, parts[index, token]).to(result.dtype)
    return result.view(-1, hidden_states.shape[-1])


def _is_transposed(experts: nn.Module, up: Tensor, down: Tensor, *, gated: bool) -> bool:
    """Whether weights are [E, in, out]; where the module does not say, its gate doubles up's outputs."""
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    return gated and up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]


def is_parallel(module: nn.Module) -> bool:
    """Whether a module keeps one projection of all experts, and is called as module(tokens [T, in], counts of each)."""
    own = dict(module.named_parameters())
    if own.keys() != {"weight"} or own["weight"].ndim != 3 or list(module.children()):
        return False
    called_with = list(inspect.signature(type(module).forward).parameters)[1:]
    return len(called_with) == 2 and called_with[1].startswith("expert_")


def is_stacked(module: nn.Module) -> bool:
    """Whether a module keeps all experts in the 2-D parameters w1, v1 and w2 of a submodule `mlp`."""
    own = dict(module.named_parameters())
    count = getattr(module, "num_experts", None)
    if own.keys() != {"mlp.w1", "mlp.v1", "mlp.w2"} or not isinstance(count, int):
        return False
    shapes = {parameter.shape for parameter in own.values()}
    return len(shapes) == 1 and len(next(iter(shapes))) == 2 and hasattr(module.mlp, "activation_fn")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear whose weight is [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()
