"""What stays dense in a packed model, on a CPU: linears such as the head, and norms. Each in one plain kernel.

    linears  bfloat16, on a CPU that does not multiply it itself, where torch is slow
    norms    the root mean square norm of Llama and its kin, which torch computes in six steps

Parameters, names, `state_dict` and saving stay as they are, and so do the values up to the order of a sum. A norm is
taken when its class's forward is, instruction for instruction, `_reference` below; others (Gemma's 1 + weight, a mean
taken off) keep their own.

Dimension key: N out_features, K in_features."""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from sparsegpt.kernels.cpu import dense as cpu_dense
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu import norm as cpu_norm
from sparsegpt.kernels.layers.plain import is_plain, same_code
from sparsegpt.kernels.layers.schemas import dense_linear


class DenseLinear(nn.Linear):
    """`torch.nn.Linear` that computes in our kernel what that can: bfloat16 without gradients or autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        # None where something else, a parametrization say, stands for the parameter
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is not None and (bias is not None or self.bias is None):
            if is_plain(input) and serves_linear(input, weight, bias):
                return cpu_dense.run(weight, input.contiguous(), bias)
            compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            if compiling and _alike_on_cpu(torch.bfloat16, input, weight, bias):
                output: Tensor = dense_linear(input, weight, bias)
                return output
        return super().forward(input)


def _reference(self, hidden_states):  # type: ignore[no-untyped-def]
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def norm_forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """[..., K] -> [..., K], what the norm's class computes: in our kernel without gradients, otherwise its own way."""
    weight = norm._parameters.get("weight")
    if weight is not None and is_plain(hidden_states) and _serves_norm(hidden_states, weight):
        return cpu_norm.run(hidden_states.contiguous(), weight, norm.variance_epsilon)  # type: ignore[arg-type]
    return type(norm).forward(norm, hidden_states)  # type: ignore[no-any-return]


def quicken_dense(model: nn.Module) -> int:
    """Give what stays dense in `model`, on the CPU, our kernels, in place; returns how many modules got one.

    What torch computes as fast on this machine stays as it is, and so does everything where there is no library.
    """
    modules = list(model.modules())
    return _quicken_linears(list(filter(_is_plain, modules))) + _quicken_norms(list(filter(_is_own_norm, modules)))


def unquicken_dense(model: nn.Module) -> None:
    """Undo `quicken_dense`."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        if is_quick_norm(module):
            del module.forward


def is_quick_norm(module: nn.Module) -> bool:
    """Whether `quicken_dense` has given a norm our kernel."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is norm_forward


def _quicken_linears(linears: list[nn.Linear]) -> int:
    if not linears or not cpu_dense.most_tokens():
        return 0
    for linear in linears:
        library.to_huge_pages(linear.weight)
        linear.__class__ = DenseLinear
    return len(linears)


def _quicken_norms(norms: list[nn.Module]) -> int:
    if not norms or library.machine_level() is None:
        return 0
    for norm in norms:
        norm.forward = partial(norm_forward, norm)
    return len(norms)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    return module.weight.is_cpu and module.weight.dtype == torch.bfloat16


def _is_own_norm(module: nn.Module) -> bool:
    return is_norm(module) and "forward" not in module.__dict__


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a norm that the kernel computes, by its class's code and where its weight is."""
    if module is None:
        return False
    weight = module._parameters.get("weight")
    return (
        same_code(type(module).forward, _reference)
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and weight is not None
        and weight.is_cpu
        and weight.is_contiguous()
        and weight.dtype in cpu_norm.DTYPES
    )


def serves_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """[..., K], [N, K] and [N]: whether the kernel computes this product, and faster than torch on this machine."""
    return (
        _alike_on_cpu(torch.bfloat16, input, weight, bias)
        and input.ndim > 0
        and input.shape[-1] == weight.shape[1]
        and 0 < input.numel() <= cpu_dense.most_tokens() * weight.shape[1]
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )


def _serves_norm(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this norm, and the library is there in the process where the model now is."""
    return (
        _alike_on_cpu(weight.dtype, input, weight)
        and weight.dtype in cpu_norm.DTYPES
        and weight.ndim == 1
        and input.shape[-1:] == weight.shape
        and input.numel() > 0
        and weight.is_contiguous()
        and library.machine_level() is not None
    )


def _alike_on_cpu(dtype: torch.dtype, *operands: Tensor | None) -> bool:
    """Tensors of one dtype on the CPU, of which nobody wants gradients or casts."""
    if torch.is_autocast_enabled("cpu"):
        return False
    for operand in operands:
        if operand is None:
            continue
        if operand.dtype != dtype or not operand.is_cpu or (operand.requires_grad and torch.is_grad_enabled()):
            return False
    return True
