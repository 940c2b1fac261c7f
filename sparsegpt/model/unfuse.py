"""Weight matrices that are no nn.Linear, shown as nn.Linear for as long as a block is worked on.

GPT-2 keeps its weights transposed (Conv1D), and mixtures of experts keep those of all experts in one parameter, which a
loop or a grouped product reads where no hook sees it. `unfused` puts equivalents built of nn.Linear in their place; the
linears' weights are views of the original parameters as long as nobody changes their dtype or device, so nothing is
copied. On leaving, the original modules stand where they stood, with the same parameter objects, and hold what has been
written into the linears.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.experts import (
    FusedExperts,
    activate,
    fused_experts,
    is_conv1d,
    is_parallel,
    is_stacked,
    run_experts,
    with_identities,
)


@contextmanager
def unfused(block: nn.Module) -> Iterator[None]:
    """Inside, weight matrices that belong to no nn.Linear are shown as one, if their form is known.

    Experts appear as `<path>.<expert>.gate_up_proj` (`up_proj` without a gate) and `<path>.<expert>.down_proj`. What
    stands in computes the same up to the order of sums. Weights of other forms stay as they are: who prunes has to say
    so (`sources` tells what is shown).
    """
    found = ((name, _twin(name, module)) for name, module in block.named_modules())
    twins = {name: twin for name, twin in found if twin is not None}
    originals = {name: block.get_submodule(name) for name in twins}
    try:
        for name, twin in twins.items():
            block.set_submodule(name, twin)
        yield
    finally:
        for name, original in originals.items():
            twins[name].write_back()
            block.set_submodule(name, original)


def sources(block: nn.Module) -> dict[str, str]:
    """Inside `unfused`: each linear by its name in the block, and the block's parameter that holds its weight."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, _Twin):
            found.update(
                {f"{path}.{name}".rstrip("."): f"{path}.{source}" for name, source in module.sources().items()}
            )
        elif isinstance(module, nn.Linear):
            found.setdefault(path, f"{path}.weight")
    return found


@torch.no_grad()
def is_plain_linear(linear: nn.Linear) -> bool:
    """Whether a linear computes inputs times its weight plus its bias; of a class with a forward of its own, by trial.

    Block-diagonal linears, such as DeepSeek-V4's, do not. Without weights in memory the shape of the result decides.
    """
    if type(linear).forward is nn.Linear.forward:
        return True
    weight = linear.weight
    inputs = torch.linspace(-1, 1, 2 * linear.in_features).reshape(1, 2, -1).to(weight.device, weight.dtype)
    try:
        outputs = type(linear).forward(linear, inputs)
        expected = functional.linear(inputs, weight, linear.bias)
    except Exception:  # whatever it does instead
        return False
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        return False
    return weight.device.type == "meta" or torch.allclose(outputs.float(), expected.float(), rtol=1e-2, atol=1e-3)


def _twin(name: str, module: nn.Module) -> "_Twin | None":
    """What shows a module's matrices as linears; None for a module that has none, or in a form that is not known."""
    if is_conv1d(module):
        return _TransposedLinear(module)
    if is_parallel(module):
        return _ParallelExperts(module)
    if is_stacked(module):
        return _StackedExperts(module)
    if not any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
        return None
    try:
        return _LoopedExperts(module, with_identities(module) or fused_experts(name, module))
    except SparseGPTError:
        return None


class _Twin(nn.Module):
    """Stands in for a module whose matrices it shows as linears."""

    def sources(self) -> dict[str, str]:
        """Its linears by their names in it, each with the original's parameter that holds its weight."""
        raise NotImplementedError

    def write_back(self) -> None:
        """Put the linears' weights where they came from."""
        raise NotImplementedError


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


class _TransposedLinear(_Twin, nn.Linear):
    """A Conv1D's twin."""

    def __init__(self, conv: nn.Module) -> None:
        nn.Linear.__init__(self, int(conv.nx), int(conv.nf), device="meta")  # type: ignore[arg-type]
        self.__dict__["conv"] = conv  # not a submodule: its parameters are shown by this linear alone
        _fill(self, *self._views(), requires_grad=any(parameter.requires_grad for parameter in conv.parameters()))

    def _views(self) -> tuple[Tensor, Tensor]:
        conv = self.__dict__["conv"]
        return conv.weight.detach().T, conv.bias.detach()

    def sources(self) -> dict[str, str]:
        return {"": "weight"}

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


class _LoopedExperts(_Twin):
    """The twin of a module that keeps all experts in one parameter a projection; its children are the experts."""

    def __init__(self, experts: nn.Module, form: FusedExperts) -> None:
        super().__init__()
        self.__dict__["experts"] = experts
        self.form = form
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
        experts = (*self.children(), *[nn.Identity()] * self.form.more)
        return run_experts(
            lambda index, inputs: experts[index](inputs), len(experts), hidden_states, *routing, **named_routing
        )

    def sources(self) -> dict[str, str]:
        return {f"{index}.{name}": name for index in range(self.form.count) for name in self.form.projections}

    @torch.no_grad()
    def write_back(self) -> None:
        for index, expert in enumerate(self.children()):
            for name in self.form.projections:
                _write(getattr(expert, name), *self._views(name, index))


class _ParallelExperts(_Twin):
    """The twin of a module that keeps one projection of all experts; its linears are experts.<expert>.linear."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = module
        self.experts = nn.ModuleList(nn.ModuleDict({"linear": _linear_of(view)}) for view in self._views())

    def _views(self) -> list[Tensor]:
        weight: nn.Parameter = self.__dict__["original"].weight
        return list(weight.detach().unbind())

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.modules() if isinstance(module, nn.Linear)]

    def sources(self) -> dict[str, str]:
        return {f"experts.{index}.linear": "weight" for index in range(len(self.experts))}

    def forward(self, inputs: Tensor, counts: Any) -> Tensor:
        """inputs [T, in], sorted by expert, so many of each -> [T, out]; an expert without tokens is not called."""
        parts = zip(self._linears(), inputs.split(list(counts)), strict=True)
        return torch.cat([linear(part) for linear, part in parts if len(part)])

    @torch.no_grad()
    def write_back(self) -> None:
        for linear, view in zip(self._linears(), self._views(), strict=True):
            _write(linear, view, None)


class _StackedExperts(_Twin):
    """The twin of a module that keeps all experts' w1, v1 and w2 one above the other; its children are the experts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = module
        for index in range(int(module.num_experts)):  # type: ignore[arg-type]
            views = self._views(index)
            self.add_module(str(index), nn.ModuleDict({name: _linear_of(view) for name, view in views.items()}))

    def _views(self, index: int) -> dict[str, Tensor]:
        """The weights [out, in] of an expert's linears, in the original parameters."""
        original = self.__dict__["original"]
        rows = {name: getattr(original.mlp, name).detach() for name in ("w1", "v1", "w2")}
        own = {name: weight.unflatten(0, (original.num_experts, -1))[index] for name, weight in rows.items()}
        return {**own, "w2": own["w2"].T}

    def sources(self) -> dict[str, str]:
        return {f"{index}.{name}": f"mlp.{name}" for index, _ in self.named_children() for name in ("w1", "v1", "w2")}

    def forward(self, hidden_states: Tensor, *routing: Any, **named_routing: Any) -> Tensor:
        """As the original's: see `run_experts`."""
        experts = tuple(self.children())
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        outputs = run_experts(
            lambda index, inputs: self._expert(experts[index], inputs), len(experts), hidden, *routing, **named_routing
        )
        return outputs.view_as(hidden_states)

    def _expert(self, expert: Any, inputs: Tensor) -> Tensor:
        outputs: Tensor = expert.w2(self.__dict__["original"].mlp.activation_fn(expert.w1(inputs)) * expert.v1(inputs))
        return outputs

    @torch.no_grad()
    def write_back(self) -> None:
        for index, expert in self.named_children():
            for name, view in self._views(int(index)).items():
                linear = expert.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                _write(linear, view, None)


def _linear_of(weight: Tensor) -> nn.Linear:
    """A linear without a bias whose weight [out, in] is this view."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    _fill(linear, weight, None, requires_grad=True)
    return linear
