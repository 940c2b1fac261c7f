"""Mixtures of experts with packed weights: each expert's projections are packed linears of their own.

Stands where transformers keeps the experts' module, and computes the same up to the order of sums. The linears are
called <experts>.<expert>.<part>: the parts of a projection, as a checkpoint calls them (gate_proj and up_proj of
gate_up_proj, say), follow one another in its outputs. A projection that is not packed, and biases, stay the parameters
that they were. transformers' experts implementations (grouped products) need the weights whole: they do not apply here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.model.experts import DOWN, activate, fused_experts, run_experts

# One expert's part of a projection: (the expert's index, part) -> its layer.
MakeLayer = Callable[[int, str], PackedLinear]


class PackedExperts(nn.Module):
    """The experts of a layer, instead of the module `experts` (whose weights may be on the meta device).

    Raises SparseGPTError, with `name`, for experts of a form that is not known.
    """

    def __init__(self, name: str, experts: nn.Module) -> None:
        super().__init__()
        self.form = fused_experts(name, experts)
        self.__dict__["original"] = experts  # no submodule: it lends its gate, and comes back when all is dense again
        self.parts: dict[str, tuple[str, ...]] = {}  # of the projections that are packed
        self.stacked: set[str] = set()  # projections that ordinary checkpoints keep in one tensor
        for key, parameter in list(experts.named_parameters(recurse=False)):
            self.register_parameter(key, parameter)
        for index in range(self.form.count):
            self.add_module(str(index), nn.Module())

    def take(self, projection: str, parts: Sequence[str], layer: MakeLayer, *, stacked: bool) -> None:
        """Give a projection packed layers in place of its parameter."""
        self.parts[projection] = tuple(parts)
        if stacked:
            self.stacked.add(projection)
        for index in range(self.form.count):
            for part in parts:
                self.get_submodule(str(index)).add_module(part, layer(index, part))
        weight = getattr(self, projection)
        delattr(self, projection)
        hollow = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        setattr(self.__dict__["original"], projection, hollow)

    def is_stacked(self, part: str) -> bool:
        """Whether ordinary checkpoints keep this part of all experts in one tensor."""
        return any(part in self.parts[projection] for projection in self.stacked)

    def forward(self, hidden_states: Tensor, *routing: Any, **named_routing: Any) -> Tensor:
        """[T, H] -> [T, H], as the original's: see `run_experts`."""
        return run_experts(self._expert, self.form.count, hidden_states, *routing, **named_routing)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The original module with its weights decompressed."""
        original: nn.Module = self.__dict__["original"]
        for key, parameter in self.named_parameters(recurse=False):
            setattr(original, key, parameter)
        for projection, parts in self.parts.items():
            layers = [self._layers(index, parts) for index in range(self.form.count)]
            whole = torch.stack([torch.cat([layer.weight for layer in expert]) for expert in layers])
            weight = whole.mT.contiguous() if self.form.transposed else whole
            setattr(original, projection, nn.Parameter(weight.to(dtype), requires_grad=False))
        return original

    def _expert(self, index: int, inputs: Tensor) -> Tensor:
        hidden = activate(self.__dict__["original"], self.form, self._project(index, self.form.up, inputs))
        return self._project(index, DOWN, hidden)

    def _project(self, index: int, projection: str, inputs: Tensor) -> Tensor:
        parts = self.parts.get(projection)
        if parts is None:
            weight = getattr(self, projection)[index]
            outputs = functional.linear(inputs, weight.T if self.form.transposed else weight)
        else:
            found = [layer(inputs) for layer in self._layers(index, parts)]
            outputs = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return outputs + getattr(self, f"{projection}_bias")[index] if self.form.biased else outputs

    def _layers(self, index: int, parts: Sequence[str]) -> list[PackedLinear]:
        expert = self._modules[str(index)]
        assert expert is not None
        return [expert._modules[part] for part in parts]  # type: ignore[misc]  # take() put them there
