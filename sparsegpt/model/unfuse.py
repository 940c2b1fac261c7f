"""Weight matrices that are no nn.Linear, shown as nn.Linear for as long as a block is worked on.

GPT-2 keeps its weights transposed (Conv1D), and mixtures of experts keep those of all experts in one 3-D parameter,
which a loop or a grouped product reads where no hook sees it. `unfused` puts equivalents built of nn.Linear in their
place; the linears' weights are views of the original parameters as long as nobody changes their dtype or device, so
nothing is copied. On leaving, the original modules stand where they stood, with the same parameter objects, and hold
what has been written into the linears.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.model.experts import FusedExperts, activate, fused_experts, is_conv1d, run_experts

# Kernels of true convolutions: no matrices that a linear could show.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def unfused(block: nn.Module) -> Iterator[None]:
    """Inside, every weight matrix that the block multiplies by belongs to an nn.Linear that is called.

    Experts appear as `<path>.<expert>.gate_up_proj` (`up_proj` without a gate) and `<path>.<expert>.down_proj`. What
    stands in computes the same up to the order of sums. Raises SparseGPTError for weights of a form that is not known.
    """
    twins = {name: _twin(name, module) for name, module in block.named_modules() if _is_fused(module)}
    originals = {name: block.get_submodule(name) for name in twins}
    try:
        for name, twin in twins.items():
            block.set_submodule(name, twin)
        yield
    finally:
        for name, original in originals.items():
            twins[name].write_back()
            block.set_submodule(name, original)


def _is_fused(module: nn.Module) -> bool:
    if is_conv1d(module):
        return True
    own = dict(module.named_parameters(recurse=False))
    return not isinstance(module, _CONVOLUTIONS) and any(parameter.ndim > 2 for parameter in own.values())


def _twin(name: str, module: nn.Module) -> "_TransposedLinear | _LoopedExperts":
    return _TransposedLinear(module) if is_conv1d(module) else _LoopedExperts(name, module)


def _write(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Copy a linear's parameters into views of the original ones, unless they are these views still."""
    for now, view in ((linear.weight, weight), (linear.bias, bias)):
        if view is not None and (now.data_ptr() != view.data_ptr() or now.dtype != view.dtype):
            view.copy_(now)


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None, *, requires_grad: bool) -> None:
    """Give a linear made on the meta device these views as its parameters."""
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)


class _TransposedLinear(nn.Linear):
    """A Conv1D's twin."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__(int(conv.nx), int(conv.nf), device="meta")  # type: ignore[arg-type]
        self.__dict__["conv"] = conv  # not a submodule: its parameters are shown by this linear alone
        _fill(self, *self._views(), requires_grad=any(parameter.requires_grad for parameter in conv.parameters()))

    def _views(self) -> tuple[Tensor, Tensor]:
        conv = self.__dict__["conv"]
        return conv.weight.detach().T, conv.bias.detach()

    @torch.no_grad()
    def write_back(self) -> None:
        _write(self, *self._views())


class _Expert(nn.Module):
    """One expert: up (and gate) projection, the family's own gate or activation, down projection."""

    def __init__(self, experts: nn.Module, form: FusedExperts, up: tuple[int, int], down: tuple[int, int]) -> None:
        super().__init__()
        self.__dict__["experts"] = experts
        self.form = form
        setattr(self, form.up, nn.Linear(*up, bias=form.biased, device="meta"))
        self.down_proj = nn.Linear(*down, bias=form.biased, device="meta")

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = activate(self.__dict__["experts"], self.form, self.get_submodule(self.form.up)(inputs))
        outputs: Tensor = self.down_proj(hidden)
        return outputs


class _LoopedExperts(nn.Module):
    """The twin of a module that keeps all experts in one parameter a projection; its children are the experts."""

    def __init__(self, name: str, experts: nn.Module) -> None:
        super().__init__()
        self.__dict__["experts"] = experts
        self.form = fused_experts(name, experts)
        for index in range(self.form.count):
            self.add_module(str(index), self._expert(index))

    def _expert(self, index: int) -> _Expert:
        experts = self.__dict__["experts"]
        views = [self._views(name, index) for name in self.form.projections]
        up, down = ((weight.shape[1], weight.shape[0]) for weight, _ in views)
        expert = _Expert(experts, self.form, up, down)
        for name, (weight, bias) in zip(self.form.projections, views, strict=True):
            asked = getattr(experts, name).requires_grad
            _fill(getattr(expert, name), weight, bias, requires_grad=asked)
        return expert

    def _views(self, name: str, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight [out_features, in_features] and bias of one expert's projection, in the original parameters."""
        experts = self.__dict__["experts"]
        weight = getattr(experts, name).detach()[index]
        bias = getattr(experts, f"{name}_bias").detach()[index] if self.form.biased else None
        return (weight.T if self.form.transposed else weight), bias

    def forward(self, hidden_states: Tensor, *routing: Any, **named_routing: Any) -> Tensor:
        """As the original's: see `run_experts`."""
        experts = tuple(self.children())
        return run_experts(
            lambda index, inputs: experts[index](inputs), len(experts), hidden_states, *routing, **named_routing
        )

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the experts' weights where they came from."""
        for index, expert in enumerate(self.children()):
            for name in self.form.projections:
                _write(getattr(expert, name), *self._views(name, index))
