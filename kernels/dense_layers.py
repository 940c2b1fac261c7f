"""Linears of a packed model that stay dense, such as its head, on a CPU that does not multiply bfloat16 itself.

There torch takes 1.4 to 4 times as long in bfloat16 as a plain kernel (BENCHMARKS.md), and for one token the head of a
small model half as long as all its packed layers. Parameters, names, `state_dict` and saving stay as they are."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from . import cpu


class DenseLinear(nn.Linear):
    """`torch.nn.Linear` that computes in our kernel what that can: bfloat16 without gradients or autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        # None where someone has put something else, a parametrization say, in the parameter's place
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is not None and (bias is not None or self.bias is None) and _serves(input, weight, bias):
            return cpu.run_dense(weight, input.contiguous(), bias)
        return super().forward(input)


def quicken_dense(model: nn.Module) -> int:
    """Make every plain bfloat16 `torch.nn.Linear` of `model` on the CPU a DenseLinear, in place; returns their number.

    None where this machine has no kernel that is faster than torch.
    """
    linears = [module for module in model.modules() if _is_plain(module)]
    if not linears or not cpu.dense_tokens():
        return 0
    for linear in linears:
        cpu.to_huge_pages(linear.weight)
        linear.__class__ = DenseLinear
    return len(linears)


def unquicken_dense(model: nn.Module) -> None:
    """Make every DenseLinear of `model` a plain `torch.nn.Linear` again, in place."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    return module.weight.is_cpu and module.weight.dtype == torch.bfloat16


def _serves(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes this product, and faster than torch on the machine where the process now runs."""
    if torch.compiler.is_compiling():
        return False
    operands = (input, weight) if bias is None else (input, weight, bias)
    return (
        input.ndim > 0
        and input.shape[-1] == weight.shape[1]
        and 0 < input.numel() <= cpu.dense_tokens() * weight.shape[1]
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and all(operand.dtype == torch.bfloat16 and operand.is_cpu for operand in operands)
        and not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands))
        and not torch.is_autocast_enabled("cpu")
    )
