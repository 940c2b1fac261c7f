"""Linears of a packed model that stay dense, such as its head, on a CPU that does not multiply bfloat16 itself.

There torch takes 1.4 to 4 times as long in bfloat16 as a plain kernel (BENCHMARKS.md), and for one token the head of a
small model half as long as all its packed layers. Transparent: parameters, names, `state_dict` and saving stay as they
are; only the forward changes, and only for what the kernel computes: bfloat16 without gradients or autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import cpu


class DenseForward:
    """The forward of one linear: through the kernel where it serves, otherwise the layer's own."""

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        self.linear, self.tokens = linear, tokens

    def __call__(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], what the layer computes, to the rounding of bfloat16."""
        parameters = self.linear._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is not None and self._serves(input, weight, bias):
            return cpu.run_dense(weight, input.contiguous(), bias)
        return type(self.linear).forward(self.linear, input)

    def _serves(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        operands = (input, weight) if bias is None else (input, weight, bias)
        return (
            input.ndim > 0
            and input.shape[-1] == weight.shape[1]
            and 0 < input.numel() <= self.tokens * weight.shape[1]
            and weight.is_contiguous()
            and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
            and all(operand.dtype == torch.bfloat16 and operand.is_cpu for operand in operands)
            and not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands))
            and not torch.is_autocast_enabled("cpu")
        )


def quicken_dense(model: nn.Module) -> int:
    """Give every dense linear of `model` whose forward is its class's own the kernel's; returns how many there are.

    None where this machine has no kernel that is faster than torch.
    """
    tokens = cpu.DENSE_TOKENS.get(cpu.machine_level() or "", 0)
    linears = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    for linear in linears if tokens else ():
        if linear.weight.is_cpu:
            cpu.to_huge_pages(linear.weight)
        linear.forward = DenseForward(linear, tokens)  # type: ignore[method-assign]
    return len(linears) if tokens else 0
