"""A linear layer whose weight stays packed 2:4: y = x W^T + b, with the kernel chosen for each call (dispatch.py).

backward for the input:  dL/dx = dL/dy W, on the decompressed weight
the weight itself does not train: unpack the model for that"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.dense import dense_weight
from sparsegpt.kernels.dispatch.packed24 import KERNELS, ROUTES, choose
from sparsegpt.kernels.dispatch.route import Choice, Route
from sparsegpt.kernels.format.pack import Packed24, pack, packed_shapes
from sparsegpt.kernels.layers.plain import autocast_device, has_tangent, is_plain
from sparsegpt.kernels.layers.schemas import introduce, packed_linear


class PackedLinear(nn.Module):
    """What linear layers with packed weights share: the choice of kernels, the checks, the gradient for the input.

    Input [..., in_features], any number of leading dimensions, any strides. A subclass has the buffers and what raises
    NotImplementedError here. transposed: ordinary checkpoints keep its weight as [in, out] (Conv1D, some experts).
    Raises SparseGPTError for an unknown `kernels` and for inputs of another width, dtype or device.
    """

    bias: Tensor | None
    transposed = False

    def __init__(self, in_features: int, out_features: int, kernels: str) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._plan: Plan | None = None
        self.kernels = kernels

    @property
    def kernels(self) -> str:
        """Which kernels may serve: "auto" or the name of one."""
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
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
        """The dense weight [out, in], decompressed on every access."""
        return self.plan().dense()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors of the weight, in the order of the file format."""
        raise NotImplementedError

    @property
    def form(self) -> tuple[int, int, int]:
        """in_features and, of a weight of integers, bits and group_size; else 0."""
        raise NotImplementedError

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that inputs of `dtype` are multiplied in."""
        raise NotImplementedError

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan for inputs of `dtype`, renewed when a buffer was replaced (moving, casting) or written to."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not is_plain(input):
            return self._as_operator(input)
        plan, input = self.planned(input)
        if input.requires_grad and torch.is_grad_enabled():
            output: Tensor = _PackedProduct.apply(input, plan, *plan.parts)  # type: ignore[no-untyped-call]
            return output
        return plan.multiply(input)

    def planned(self, input: Tensor) -> tuple[Plan, Tensor]:
        """What serves this input, and the input as it takes it; raises SparseGPTError for one that does not fit."""
        plan = self.plan(input.dtype)
        return plan, self.fitting(input, plan.parts, plan.dtype, plan.autocast)

    def fitting(self, input: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype, autocast: str) -> Tensor:
        """The input, in `dtype` under autocast; raises SparseGPTError where it or the parts cannot be multiplied."""
        for tensor in parts:
            if tensor.requires_grad:
                raise SparseGPTError(
                    "a packed 2:4 layer does not train its weight or bias; unpack the model for training"
                )
        device = parts[0].device
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
            raise SparseGPTError("a packed 2:4 layer has no forward derivatives; unpack the model for them")
        weight, bias = self.operands, self.bias
        parts = weight if bias is None else (*weight, bias)
        input = self.fitting(input, parts, self.computes_in(input.dtype), autocast_device(weight[0]))
        output: Tensor = packed_linear(input, list(weight), bias, self._kernels, *self.form)
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


class Sparse24Linear(PackedLinear):
    """`torch.nn.Linear` on a packed weight.

    Buffers: values [out, Kp / 2] floating point, meta [out, Kp / 32] int32, bias [out] or None (format: pack.py).
    Inputs, outputs and bias have the dtype of `values`; under autocast inputs are cast to it. Created with zeros: load
    a state dict or use `from_linear`. Raises SparseGPTError for in_features not divisible by 4, and on use for a bias
    of another shape, dtype or device.
    """

    values: Tensor
    meta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kernels: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, kernels)
        values_shape, meta_shape = packed_shapes((out_features, in_features))
        self.register_buffer("values", torch.zeros(values_shape, dtype=dtype, device=device))
        # 0x44444444: every group keeps positions 0 and 1
        self.register_buffer("meta", torch.full(meta_shape, 0x44444444, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, kernels: str = "auto", name: str = "weight") -> Sparse24Linear:
        """Pack a dense 2:4 layer; raises SparseGPTError naming `name` and the first bad group otherwise."""
        return cls.from_packed(pack(linear.weight.detach(), name), linear.bias, kernels=kernels)

    @classmethod
    def from_packed(cls, packed: Packed24, bias: Tensor | None, *, kernels: str = "auto") -> Sparse24Linear:
        """A layer on these very tensors (no copy)."""
        rows, columns = packed.shape
        layer = cls(columns, rows, bias is not None, kernels=kernels, dtype=packed.values.dtype, device="meta")
        layer.values, layer.meta = packed.values, packed.meta
        layer.bias = None if bias is None else bias.detach()
        return layer

    @property
    def packed(self) -> Packed24:
        """The weight in packed form (the buffers themselves)."""
        return Packed24(self.values, self.meta, (self.out_features, self.in_features))

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """values and meta."""
        return self.values, self.meta

    @property
    def form(self) -> tuple[int, int, int]:
        """in_features, and no bits."""
        return self.in_features, 0, 0

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of `values`."""
        return self.values.dtype

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        """The plan, of one dtype whatever is asked."""
        # the dictionary itself: a buffer's attribute look-up costs a tenth of a small product
        plan, buffers = self._plan, self._buffers
        values, meta, bias = buffers["values"], buffers["meta"], buffers["bias"]
        last = meta if bias is None else bias
        if (
            plan is None
            or plan.parts[0] is not values
            or plan.parts[1] is not meta
            or plan.parts[-1] is not last
            or plan.written()
        ):
            assert values is not None and meta is not None
            packed = Packed24(values.contiguous(), meta.contiguous(), (self.out_features, self.in_features))
            parts = (values, meta) if bias is None else (values, meta, bias)
            choice = choose(packed, self._kernels)
            plan = self._plan = Plan(packed, parts, bias, values.dtype, choice, ROUTES, dense_weight)
            introduce(self)
        return plan


class Plan:
    """What a forward pass needs, worked out once for the tensors `parts` that a layer holds, as they now are.

    weight: contiguous, since kernels go by addresses. Raises SparseGPTError for a bias that is not [N] of `dtype` on
    the weight's device.
    """

    def __init__(
        self,
        weight: Any,
        parts: tuple[Tensor, ...],
        bias: Tensor | None,
        dtype: torch.dtype,
        choice: Choice,
        routes: Mapping[str, Route],
        dense: Callable[[Any], Tensor],
    ) -> None:
        device = parts[0].device
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.device != device):
            raise SparseGPTError(
                f"expected a bias [{weight.shape[0]}] in {dtype} on {device}; found {list(bias.shape)} in {bias.dtype} "
                f"on {bias.device}: cast or move it, or the layer"
            )
        self.weight, self.dtype, self.choice = weight, dtype, choice
        self.bias = None if bias is None else bias.contiguous()
        self.parts, self._routes, self._dense = parts, routes, dense
        self._versions = [(part, part._version) for part in parts if not part.is_inference()]
        self.autocast = autocast_device(parts[0])
        self._states: dict[str, Any] = {}

    def written(self) -> bool:
        """Whether somebody has written to one of the parts since; inference tensors do not tell."""
        for part, version in self._versions:  # noqa: SIM110 - asked for every product: a generator would cost more
            if part._version != version:
                return True
        return False

    def dense(self) -> Tensor:
        """The decompressed weight [N, K]."""
        return self._dense(self.weight)

    def route(self, tokens: int) -> tuple[Route, Any]:
        """The route for so many tokens and its state."""
        name = self.choice.route(tokens)
        if name not in self._states:
            self._states[name] = self._routes[name].prepare(self.weight)
        return self._routes[name], self._states[name]

    def multiply(self, input: Tensor) -> Tensor:
        """[..., in_features] of the right dtype and device -> [..., out_features], in that dtype under autocast too."""
        if torch.is_autocast_enabled(self.autocast):
            with torch.autocast(self.autocast, enabled=False):
                return self.multiply(input)
        rows, columns = self.weight.shape
        tokens = input.numel() // columns if columns else 0
        if tokens == 0:
            return input.new_empty(*input.shape[:-1], rows)
        route, state = self.route(tokens)
        if route.any_shape or input.ndim == 2:
            return route.run(state, input.contiguous(), self.bias)
        outputs_TN = route.run(state, input.reshape(-1, columns).contiguous(), self.bias)
        return outputs_TN.reshape(*input.shape[:-1], rows)

    def multiply_back(self, grads: Tensor) -> Tensor:
        """Gradients [..., out_features] of the outputs -> [..., in_features], those of the inputs."""
        with torch.autocast(self.autocast, enabled=False):
            return grads @ self.dense()


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
    counts: dict[Choice, int] = {}
    for layer in packed_layers(model).values():
        counts[layer.choice] = counts.get(layer.choice, 0) + 1
    return "; ".join(f"{count} packed 2:4 layers: {choice}" for choice, count in counts.items())
