"""Linear layers whose weight stays packed: y = x W^T + b, with the kernel chosen for each call (dispatch/route.py).

backward for the input:  dL/dx = dL/dy W, on the decompressed weight
the weight itself does not train: unpack the model for that

Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.route import KERNELS, Choice, Route, Table
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.layers.plain import autocast_device, has_tangent, is_plain
from sparsegpt.kernels.layers.schemas import introduce, packed_linear


class PackedLinear(nn.Module):
    """[..., K] -> [..., N]: what linear layers with packed weights share, from the choice of kernels to the gradient.

    Inputs have any number of leading dimensions and any strides. A subclass has a table, a buffer for each part of its
    form, and what raises NotImplementedError here. transposed: ordinary checkpoints keep its weight as [K, N] (Conv1D,
    some experts). Raises SparseGPTError for an unknown `kernels` and for inputs of another width, dtype or device.
    """

    table: ClassVar[Table]
    bias: Tensor | None
    transposed = False

    def __init__(self, form: Form, in_features: int, out_features: int, kernels: str) -> None:
        super().__init__()
        self.form, self.form_text = form, json.dumps(form.settings())
        self.in_features, self.out_features = in_features, out_features
        self._plan: Plan | None = None
        self.kernels = kernels

    @classmethod
    def from_packed(cls, packed: Any, bias: Tensor | None, *, kernels: str = "auto") -> Self:
        """Packed [N, K] and bias [N] -> a layer on these very tensors (no copy)."""
        form, (rows, columns) = cls.form_of(packed), packed.shape
        layer = cls(form, columns, rows, kernels)
        for name, tensor in zip(form.parts, form.tensors(packed), strict=True):
            layer.register_buffer(name, tensor)
        layer.register_buffer("bias", None if bias is None else bias.detach())
        return layer

    @staticmethod
    def form_of(packed: Any) -> Form:
        """Packed [N, K] -> its form. Raises NotImplementedError here."""
        raise NotImplementedError

    @staticmethod
    def for_inputs(packed: Any, dtype: torch.dtype) -> Any:
        """Packed [N, K] -> it as the table takes it for inputs of `dtype`: here the weight itself."""
        return packed

    def computes_in(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype that inputs of `dtype` are multiplied in, None for the usual one: here that of the first part."""
        return self.operands[0].dtype

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan for inputs of `dtype`, renewed when a buffer was replaced (moving, casting) or written to.

        Raises SparseGPTError for a bias that does not fit, a dtype that the layer does not multiply in, or `kernels`
        that cannot serve.
        """
        plan, buffers = self._plan, self._buffers
        parts = tuple([t for name in (*self.form.parts, "bias") if (t := buffers[name]) is not None])
        same = plan is not None and len(parts) == len(plan.parts) and all(map(operator.is_, plan.parts, parts))
        if plan is None or not same or plan.dtype != (dtype or plan.dtype) or plan.written():
            dtype = self.computes_in(dtype)
            weight = self.for_inputs(self.packed.settled(), dtype)
            choice = self.table.choose(weight, self._kernels)
            plan = self._plan = Plan(weight, parts, self.bias_in(dtype), dtype, choice, self.table)
            introduce(self)
        return plan

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias [N] for products in `dtype`."""
        return self.bias

    @property
    def kernels(self) -> str:
        """Which kernels may serve: "auto" or the name of one."""
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        """Choose anew. Raises SparseGPTError for an unknown name."""
        if kernels not in KERNELS:
            raise SparseGPTError(f"kernels: expected one of {', '.join(KERNELS)}; found {kernels!r}")
        self._kernels = kernels
        self._plan = None

    @property
    def choice(self) -> Choice:
        """The route chosen for this layer where it now lies, and why."""
        return self.plan().choice

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K], decompressed on every access."""
        return self.plan().dense()

    @property
    def packed(self) -> Any:
        """The weight [N, K] in packed form (the buffers themselves)."""
        return self.form.packed(self.operands, (self.out_features, self.in_features))

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors of the weight [N, K], in the order of the form's parts."""
        return tuple([getattr(self, part) for part in self.form.parts])

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]; raises SparseGPTError as the class says."""
        if not is_plain(input):
            return self._as_operator(input)
        plan, input = self.planned(input)
        if input.requires_grad and torch.is_grad_enabled():
            output: Tensor = _PackedProduct.apply(input, plan, *plan.parts)  # type: ignore[no-untyped-call]
            return output
        return plan.multiply(input)

    def planned(self, input: Tensor) -> tuple[Plan, Tensor]:
        """What serves inputs [..., K], and these as it takes them; SparseGPTError for inputs that do not fit."""
        plan = self.plan(input.dtype)
        return plan, self.fitting(input, plan.parts, plan.dtype, plan.device, plan.autocast)

    def fitting(
        self, input: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device, autocast: str
    ) -> Tensor:
        """[..., K] -> [..., K], in `dtype` under autocast. Raises SparseGPTError where it or the parts do not fit."""
        for tensor in parts:
            if tensor.requires_grad:
                raise SparseGPTError("a packed layer does not train its weight or bias; unpack the model for training")
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise SparseGPTError(f"expected inputs [..., {self.in_features}]; found {tuple(input.shape)}")
        if input.dtype != dtype and torch.is_autocast_enabled(autocast):
            input = input.to(dtype)
        if input.dtype != dtype or input.device != device:
            raise SparseGPTError(
                f"expected inputs in {dtype} on {device}; found {input.dtype} on {input.device}: "
                "cast or move them, or the layer"
            )
        return input

    def _as_operator(self, input: Tensor) -> Tensor:
        """`forward` where torch must see what is computed."""
        if not torch.compiler.is_compiling() and has_tangent(input):
            raise SparseGPTError("a packed layer has no forward derivatives; unpack the model for them")
        weight, bias = self.operands, self.bias
        parts = weight if bias is None else (*weight, bias)
        device, autocast = weight[0].device, autocast_device(weight[0])
        input = self.fitting(input, parts, self.computes_in(input.dtype), device, autocast)
        shape = (self.out_features, self.in_features)
        output: Tensor = packed_linear(input, list(weight), bias, self._kernels, self.form_text, *shape)
        return output

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._plan = None  # inference tensors do not count how often they are written to

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # worked out anew by whoever copies or loads the layer

    def extra_repr(self) -> str:
        """Shape, bias and kernels, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kernels={self._kernels}"
        )


class Plan:
    """What a product [..., K] -> [..., N] needs, worked out once for the tensors `parts` of a layer as they now are.

    weight: packed, of the table's format; contiguous, since kernels go by addresses. Raises SparseGPTError for a bias
    that is not [N] of `dtype` on the weight's device.
    """

    def __init__(
        self,
        weight: Any,
        parts: tuple[Tensor, ...],
        bias: Tensor | None,
        dtype: torch.dtype,
        choice: Choice,
        table: Table,
    ) -> None:
        device = parts[0].device
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.device != device):
            raise SparseGPTError(
                f"expected a bias [{weight.shape[0]}] in {dtype} on {device}; found {list(bias.shape)} in {bias.dtype} "
                f"on {bias.device}: cast or move it, or the layer"
            )
        self.weight, self.dtype, self.choice, self.table = weight, dtype, choice, table
        self.bias = None if bias is None else bias.contiguous()
        self.parts = parts
        self._versions = [(part, part._version) for part in parts if not part.is_inference()]
        self.device, self.autocast = device, autocast_device(parts[0])
        self._shape = weight.shape
        self._served: dict[str, tuple[Route, Any]] = {}

    def written(self) -> bool:
        """Whether somebody has written to one of the parts since; inference tensors do not tell."""
        for part, version in self._versions:  # noqa: SIM110 - asked for every product: a generator would cost more
            if part._version != version:
                return True
        return False

    def dense(self) -> Tensor:
        """The decompressed weight [N, K]."""
        return self.table.dense(self.weight)

    def route(self, tokens: int) -> tuple[Route, Any]:
        """The route for so many tokens and its state."""
        name = self.choice.route(tokens)
        return self._served.get(name) or self._serve(name)

    def _serve(self, name: str) -> tuple[Route, Any]:
        route = self.table.routes[name]
        self._served[name] = route, route.prepare(self.weight)
        return self._served[name]

    def multiply(self, input: Tensor) -> Tensor:
        """[..., K] of the right dtype and device -> [..., N], in that dtype under autocast too."""
        if torch.is_autocast_enabled(self.autocast):
            with torch.autocast(self.autocast, enabled=False):
                return self.multiply(input)
        rows, columns = self._shape
        tokens = input.numel() // columns if columns else 0
        if tokens == 0:
            return input.new_empty(*input.shape[:-1], rows)
        name = self.choice.route(tokens)
        route, state = self._served.get(name) or self._serve(name)  # `route`, without the call
        if route.any_shape or input.ndim == 2:
            return route.run(state, input.contiguous(), self.bias)
        outputs_TN = route.run(state, input.reshape(-1, columns).contiguous(), self.bias)
        return outputs_TN.reshape(*input.shape[:-1], rows)

    def multiply_back(self, grads: Tensor) -> Tensor:
        """Gradients [..., N] of the outputs -> [..., K], those of the inputs."""
        with torch.autocast(self.autocast, enabled=False):
            return grads @ self.dense()


class Plans:
    """The plans of some layers for inputs of one dtype, and whether they are still these; to ask costs little."""

    def __init__(self, layers: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        self.found = [layer.plan(dtype) for layer in layers]
        self._layers = [layer.__dict__ for layer in layers]
        self._buffers = [(layer._buffers, name) for layer in layers for name in (*layer.form.parts, "bias")]
        self._parts = [owner[name] for owner, name in self._buffers]
        self._copied = self.found

    def read_by(self, tensors: Iterable[Tensor]) -> None:
        """[...], ...: what is computed with. Layers all of whose parts are among them may be written to."""
        addresses = {tensor.data_ptr() for tensor in tensors}
        self._copied = [plan for plan in self.found if any(part.data_ptr() not in addresses for part in plan.parts)]

    def hold(self) -> bool:
        """Whether every layer would give the same plan, as `PackedLinear.plan` decides it."""
        return (
            [layer["_plan"] for layer in self._layers] == self.found
            and all(map(operator.is_, [owner[name] for owner, name in self._buffers], self._parts))
            and not any(plan.written() for plan in self._copied)
        )


class _PackedProduct(torch.autograd.Function):
    """Forward through the chosen kernel, backward for the input through the decompressed weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, plan: Plan, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.plan = plan
        return plan.multiply(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors  # looked up for torch's check that nobody has written to them since
        return ctx.plan.multiply_back(grads[0]), None, *(None for _ in parts)


def set_kernels(model: nn.Module, kernels: str) -> int:
    """Make every packed layer of `model` use these kernels ("auto" or a name of KERNELS); returns how many there are.

    Raises SparseGPTError at once when the kernels cannot serve one of the layers.
    """
    layers = packed_layers(model)
    for layer in layers.values():
        layer.kernels = kernels
        _ = layer.choice
    return len(layers)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """{name: layer} of the packed layers of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def explain(model: nn.Module) -> str:
    """One line on what was chosen for the packed layers of a model, and why."""
    counts: dict[tuple[str, Choice], int] = {}
    for layer in packed_layers(model).values():
        kind = (layer.form.pattern, layer.choice)
        counts[kind] = counts.get(kind, 0) + 1
    return "; ".join(f"{count} packed {pattern} layers: {choice}" for (pattern, choice), count in counts.items())
