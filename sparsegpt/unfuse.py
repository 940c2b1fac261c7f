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

from sparsegpt.errors import SparseGPTError

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
    if _is_conv1d(module):
        return True
    own = dict(module.named_parameters(recurse=False))
    return not isinstance(module, _CONVOLUTIONS) and any(parameter.ndim > 2 for parameter in own.values())


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear whose weight is [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()


def _twin(name: str, module: nn.Module) -> "_TransposedLinear | _LoopedExperts":
    return _TransposedLinear(module) if _is_conv1d(module) else _LoopedExperts(name, module)


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

    def __init__(
        self, experts: nn.Module, up_name: str, up: tuple[int, int], down: tuple[int, int], bias: bool
    ) -> None:
        super().__init__()
        self.__dict__["experts"] = experts
        self.up_name = up_name
        setattr(self, up_name, nn.Linear(*up, bias=bias, device="meta"))
        self.down_proj = nn.Linear(*down, bias=bias, device="meta")

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(self._activate(self.get_submodule(self.up_name)(inputs)))
        return outputs

    def _activate(self, hidden: Tensor) -> Tensor:
        experts = self.__dict__["experts"]
        if self.up_name == "up_proj":
            return experts.act_fn(hidden)  # type: ignore[no-any-return]
        if hasattr(experts, "_apply_gate"):
            return experts._apply_gate(hidden)  # type: ignore[no-any-return]
        gate, up = hidden.chunk(2, dim=-1)
        return experts.act_fn(gate) * up  # type: ignore[no-any-return]


class _LoopedExperts(nn.Module):
    """The twin of a module that keeps all experts in one parameter a projection; its children are the experts."""

    def __init__(self, name: str, experts: nn.Module) -> None:
        super().__init__()
        own = dict(experts.named_parameters())
        gated = "gate_up_proj" in own
        self.up_name = "gate_up_proj" if gated else "up_proj"
        biases = {f"{self.up_name}_bias", "down_proj_bias"}
        if not {self.up_name, "down_proj"} <= own.keys() <= {self.up_name, "down_proj"} | biases:
            raise SparseGPTError(
                f"{name}: expected experts with gate_up_proj (or up_proj) and down_proj in {type(experts).__name__}, "
                f"found {', '.join(own)}: weights of this form cannot be pruned"
            )
        self.__dict__["experts"] = experts
        self.transposed = _is_transposed(experts, own[self.up_name], own["down_proj"], gated=gated)
        self.biased = biases <= own.keys()
        for place in range(len(own["down_proj"])):
            self.add_module(str(place), self._expert(place))

    def _expert(self, place: int) -> _Expert:
        experts = self.__dict__["experts"]
        views = [self._views(name, place) for name in (self.up_name, "down_proj")]
        up, down = ((weight.shape[1], weight.shape[0]) for weight, _ in views)
        expert = _Expert(experts, self.up_name, up, down, self.biased)
        for name, (weight, bias) in zip((self.up_name, "down_proj"), views, strict=True):
            asked = getattr(experts, name).requires_grad
            _fill(getattr(expert, name), weight, bias, requires_grad=asked)
        return expert

    def _views(self, name: str, place: int) -> tuple[Tensor, Tensor | None]:
        """Weight [out_features, in_features] and bias of one expert's projection, in the original parameters."""
        experts = self.__dict__["experts"]
        weight = getattr(experts, name).detach()[place]
        bias = getattr(experts, f"{name}_bias").detach()[place] if self.biased else None
        return (weight.T if self.transposed else weight), bias

    def forward(self, hidden_states: Tensor, *routing: Any, **named_routing: Any) -> Tensor:
        """Hidden states [T, C] with each token's experts and their shares [T, K]; or [E * T, C], expert by expert.

        An expert that no token is sent to is not called.
        """
        if not routing and not named_routing:
            return self._sorted(hidden_states)
        chosen, shares = (*routing, *named_routing.values())
        result = torch.zeros_like(hidden_states)
        for place, expert in enumerate(self.children()):
            token, rank = torch.where(chosen == place)
            if len(token):
                outputs = expert(hidden_states[token]) * shares[token, rank, None]
                result.index_add_(0, token, outputs.to(result.dtype))
        return result

    def _sorted(self, hidden_states: Tensor) -> Tensor:
        """Llama 4: every expert is given every token, multiplied by 0 where it was not chosen."""
        parts = hidden_states.view(len(self._modules), -1, hidden_states.shape[-1])
        result = torch.zeros_like(parts)
        for place, expert in enumerate(self.children()):
            (token,) = torch.where(parts[place].any(-1))
            if len(token):
                result[place, token] = expert(parts[place, token]).to(result.dtype)
        return result.view(-1, hidden_states.shape[-1])

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the experts' weights where they came from."""
        for place, expert in enumerate(self.children()):
            for name in (self.up_name, "down_proj"):
                _write(getattr(expert, name), *self._views(name, place))


def _is_transposed(experts: nn.Module, up: Tensor, down: Tensor, *, gated: bool) -> bool:
    """Whether weights are [experts, in_features, out_features]; where the module does not say, its gate doubles up."""
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    return gated and up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
