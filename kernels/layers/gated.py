"""Gated feed-forward blocks of packed models: gate and up in one kernel, silu(x Wg^T) * (x Wu^T) (Shazeer 2020).

Transparent: parameters, names, `state_dict` and saving are the model's own; only the forward of the block changes, and
only while nothing watches or has replaced its parts. A block is taken when its forward is, instruction for instruction,

    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)); return down_proj

with a SiLU and packed layers without biases; others (a scale in between, another activation) keep their own forward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.kernels.layers.plain import is_plain, same_code

GLOBAL_HOOKS = (module_globals._global_forward_hooks, module_globals._global_forward_pre_hooks)


def _reference(self, x):  # type: ignore[no-untyped-def]
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504  # the very instructions of the models' own forward


def gated_forward(block: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """[..., K] -> [..., K], what the block's class computes, to the rounding of the dtype: fused where a kernel is.

    activation: the one that the block had when it was taken.
    """
    if not is_plain(x):  # a compiler fuses what lies between the products itself
        return type(block).forward(block, x)  # type: ignore[no-any-return]
    modules = block._modules
    gate, up = modules["gate_proj"], modules["up_proj"]
    if modules["act_fn"] is activation and all(_unwatched(part) for part in (gate, up, activation)):
        hidden = _fused(gate, up, x)
        if hidden is not None:
            output: Tensor = modules["down_proj"](hidden)  # type: ignore[misc]
            return output
    return type(block).forward(block, x)  # type: ignore[no-any-return]


def fuse_gated(model: nn.Module) -> int:
    """Give every gated block of packed layers in `model` the fused forward; returns how many there are."""
    blocks = [module for module in model.modules() if is_gated(module)]
    for block in blocks:
        block.forward = partial(gated_forward, block, block.get_submodule("act_fn"))
    return len(blocks)


def is_gated(module: nn.Module) -> bool:
    """Whether a block has the form and a kernel for it, and its forward is still its class's own."""
    if "forward" in module.__dict__ or not has_gate(module):
        return False
    gate: Any = module.get_submodule("gate_proj")
    return any(route.swiglu for route in gate.table.routes.values())


def has_gate(module: nn.Module) -> bool:
    """Whether a module is a gated block in the sense of this file, whatever kernels there are."""
    gate, up, down = (module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
    if not isinstance(gate, PackedLinear) or type(gate) is not type(up) or not isinstance(down, PackedLinear):
        return False
    assert isinstance(up, PackedLinear)
    if gate.bias is not None or up.bias is not None:
        return False
    same = (gate.in_features, gate.out_features) == (up.in_features, up.out_features)
    return same and _is_silu(module._modules.get("act_fn")) and same_code(type(module).forward, _reference)


def _fused(gate: Any, up: Any, x: Tensor) -> Tensor | None:
    """[..., K] -> silu(gate(x)) * up(x) [..., N] in one kernel, or None where no kernel does that."""
    if type(gate) is not type(up) or not isinstance(gate, PackedLinear):
        return None
    if gate.bias is not None or up.bias is not None or (x.requires_grad and torch.is_grad_enabled()):
        return None
    (gate_plan, x), (up_plan, _) = gate.planned(x), up.planned(x)
    tokens = x.numel() // max(1, gate.in_features)
    if tokens == 0:
        return None
    (route, gate_state), (up_route, up_state) = gate_plan.route(tokens), up_plan.route(tokens)
    if route.swiglu is None or tokens > route.swiglu_tokens or route is not up_route:
        return None
    if route.any_shape or x.ndim == 2:
        return route.swiglu(gate_state, up_state, x.contiguous())
    flat_TN = route.swiglu(gate_state, up_state, x.reshape(-1, gate.in_features).contiguous())
    return flat_TN.reshape(*x.shape[:-1], gate.out_features)


def _unwatched(module: Any) -> bool:
    """No hooks, global or own, and no forward put over the class's."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(GLOBAL_HOOKS)
    )


def _is_silu(module: nn.Module | None) -> bool:
    kind = type(module)
    return kind is nn.SiLU or (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation")
