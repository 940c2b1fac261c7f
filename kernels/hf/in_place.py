"""A model in memory whose weights become packed where they are: linears, GPT-2's Conv1D, experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.hf.decode import step_blocks
from sparsegpt.kernels.layers.dense_layers import DenseLinear, quicken_dense
from sparsegpt.kernels.layers.experts import PackedExperts
from sparsegpt.kernels.layers.forms import layer_class, usual_forms
from sparsegpt.kernels.layers.gated import fuse_gated
from sparsegpt.kernels.layers.linear import PackedLinear
from sparsegpt.model.experts import fused_experts, is_conv1d


def pack_linears(
    model: nn.Module,
    *,
    kernels: str = "auto",
    skip: Iterable[str] = ("lm_head",),
    form: Form | Sequence[Form] | None = None,
) -> list[str]:
    """Replace in place every linear of `model` that keeps a form's pattern by a packed one; returns their names.

    form: how weights are stored, or several of which each weight takes the first whose pattern it keeps; by default 2:4
    or a bitmask, with every bit kept. skip: last name components left alone. Of experts that share a parameter, a
    projection is packed when those of all of them keep one pattern. Weights that another module shares are left alone
    too. Linears that stay dense become DenseLinear where that is quicker. Afterwards
    `save_pretrained` raises SparseGPTError: transformers does not know how a checkpoint names what is packed here.
    """
    forms = [form] if isinstance(form, Form) else form or usual_forms()
    shared = _shared_parameters(model)
    replaced = []
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in skip or any(id(parameter) in shared for parameter in module.parameters(False)):
            continue
        if type(module) in (nn.Linear, DenseLinear) or is_conv1d(module):
            replaced += _pack_linear(model, name, module, kernels, forms)
        elif any(parameter.ndim == 3 for parameter in module.parameters(False)):
            replaced += _pack_experts(model, name, module, kernels, forms)
    fuse_gated(model)
    quicken_dense(model)
    step_blocks(model)
    for module in model.modules() if replaced else ():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = _refuse_saving  # type: ignore[assignment]
    return replaced


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise SparseGPTError(
        "a model packed in memory cannot be saved: save it before packing, then run `python -m sparsegpt pack` on it"
    )


def _pack_linear(model: nn.Module, name: str, module: Any, kernels: str, forms: Sequence[Form]) -> list[str]:
    transposed = is_conv1d(module)
    weight = _weight(module.weight, transposed)
    form = next((form for form in forms if form.keeps(weight)), None)
    if form is None:
        return []
    packed = form.of_model(weight.dtype).pack(weight, name)
    layer = layer_class(form).from_packed(packed, module.bias, kernels=kernels)
    layer.transposed = transposed
    model.set_submodule(name, layer)
    return [name]


def _pack_experts(model: nn.Module, name: str, module: nn.Module, kernels: str, forms: Sequence[Form]) -> list[str]:
    try:
        fused = fused_experts(name, module)
    except SparseGPTError:  # 3-D weights of another kind, such as a convolution's
        return []
    weights = {key: _weight(getattr(module, key), fused.transposed) for key in fused.projections}
    keeping = {key: [form for form in forms if all(map(form.keeps, weight))] for key, weight in weights.items()}
    kept = {key: found[0] for key, found in keeping.items() if found}
    if not kept:
        return []
    experts = PackedExperts(name, module)
    for projection, chosen in kept.items():

        def layer(index: int, part: str, weight: Tensor = weights[projection], form: Form = chosen) -> PackedLinear:
            packed = form.of_model(weight.dtype).pack(weight[index], f"{name}.{index}.{part}")
            return layer_class(form).from_packed(packed, None, kernels=kernels)

        experts.take(projection, [projection], layer, stacked=True)
    model.set_submodule(name, experts)
    return [f"{name}.{index}.{projection}" for index in range(fused.count) for projection in kept]


def _weight(weight: Tensor, transposed: bool) -> Tensor:
    """A parameter [..., K, N] where transposed, else [..., N, K] -> the weight [..., N, K]."""
    return weight.detach().mT if transposed else weight.detach()


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
