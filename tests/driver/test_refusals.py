"""Weights that are no plain numbers of the model are refused before anything changes, each with what resolves it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from tests.support import assert_pattern, prune_model, random_windows, refused, tiny_model, weights_of


def up_proj(model) -> nn.Linear:
    return model.model.layers[1].mlp.up_proj


NAME = "model.layers.1.mlp.up_proj"


class Doubling(nn.Module):
    """A parametrisation of somebody's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def own_parametrisation(linear):
    parametrize.register_parametrization(linear, "weight", Doubling())


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "own": (own_parametrisation, "remove_parametrizations"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
    "mask": (lambda linear: torch_prune.l1_unstructured(linear, "weight", amount=0.3), "prune.remove"),
    "two masks": (
        lambda linear: [torch_prune.random_unstructured(linear, "weight", amount=0.1) for _ in range(2)],
        "prune.remove",
    ),
    "structured mask": (lambda linear: torch_prune.ln_structured(linear, "weight", 0.3, n=2, dim=0), "prune.remove"),
}


def resolve(linear, call: str) -> None:
    if call == "remove_parametrizations":
        parametrize.remove_parametrizations(linear, "weight")
    elif call == "prune.remove":
        torch_prune.remove(linear, "weight")
    else:
        torch.nn.utils.remove_spectral_norm(linear)


@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_anew_is_refused_with_the_call_that_ends_it(how):
    model = tiny_model("llama")
    change, call = COMPUTED[how]
    change(up_proj(model))
    before = weights_of(model)
    with refused(f"{NAME}.weight", "computed anew", call, '"weight"'):
        prune_model(model, random_windows(), "2:4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    resolve(up_proj(model), call)
    prune_model(model, random_windows(), "2:4", preset="paper")
    assert (up_proj(model).weight != 0).reshape(-1, 4).sum(1).max() == 2  # a mask may have left fewer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_is_refused_too():
    model = tiny_model("llama")
    torch.nn.utils.weight_norm(up_proj(model))
    with refused(f"{NAME}.weight", "remove_weight_norm"):
        prune_model(model, random_windows(), "2:4")


def test_experts_that_are_masked_are_refused():
    model = tiny_model("mixtral", num_local_experts=4)
    torch_prune.l1_unstructured(model.model.layers[0].mlp.experts, "down_proj", amount=0.2)
    with refused("model.layers.0.mlp.experts.down_proj", 'prune.remove(module, "down_proj")'):
        prune_model(model, random_windows(), "2:4")


def test_a_weight_that_is_no_parameter_is_refused():
    model = tiny_model("llama")
    linear = up_proj(model)
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight
    with refused(f"{NAME}.weight", "torch.nn.Parameter"):
        prune_model(model, random_windows(), "2:4")


# Adapters


class Adapted(nn.Module):
    """Something added to a linear; what the parts are called differs from library to library."""

    def __init__(self, linear: nn.Linear, base: str, rank: int = 4) -> None:
        super().__init__()
        setattr(self, base, linear)
        self.base = base
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self, self.base)(inputs) + self.up(self.down(inputs))


class Scaled(nn.Module):
    """A vector that multiplies what the linear gives."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        outputs = linear.out_features if isinstance(linear, nn.Linear) else linear.nf
        self.inner, self.scale = linear, nn.Parameter(torch.ones(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) * self.scale


WRAPPERS = {
    "base_layer": lambda linear: Adapted(linear, "base_layer"),
    "linear": lambda linear: Adapted(linear, "linear"),
    "scaled": Scaled,
    "twice": lambda linear: nn.Sequential(Scaled(linear)),
}


@pytest.mark.parametrize(("model_type", "how"), [*(("llama", how) for how in WRAPPERS), ("gpt2", "scaled")])
def test_a_linear_in_a_wrapper_that_adds_to_it_is_refused(model_type, how):
    if model_type == "gpt2":
        model = tiny_model("gpt2", n_inner=64, intermediate_size=None, num_key_value_heads=None)
        owner, name = model.transformer.h[1].mlp, "c_fc"
    else:
        model = tiny_model("llama")
        owner, name = model.model.layers[1].mlp, "up_proj"
    setattr(owner, name, WRAPPERS[how](getattr(owner, name)))
    before = weights_of(model)
    with refused(f".1.mlp.{name} is wrapped", "merge"):
        prune_model(model, random_windows(), "2:4")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_wrapper_that_adds_nothing_is_none():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Sequential(up_proj(model))
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    assert f"{NAME}.0" in {layer.name for layer in report.layers}
    assert_pattern(up_proj(model)[0].weight, "2:4")


def test_a_linear_that_was_taken_apart_is_pruned_as_it_is():
    """Two factors in the place of one matrix are layers of the model like any other."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 64, bias=False))
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    assert {f"{NAME}.0", f"{NAME}.1"} <= {layer.name for layer in report.layers}


class WithBottleneck(nn.Module):
    """An adapter beside the layers of an MLP, not around one of them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, part in mlp.named_children():
            self.add_module(name, part)
        self.adapter_down, self.adapter_up = nn.Linear(32, 4), nn.Linear(4, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return outputs + self.adapter_up(torch.relu(self.adapter_down(outputs)))


def test_linears_that_were_added_stay_as_they_are_and_are_named():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = WithBottleneck(layer.mlp)
    before = weights_of(model)
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    added = [name for name in before if "adapter" in name]
    for name in added:
        assert torch.equal(model.get_parameter(name), before[name]), name
    counts = report.parameters.not_prunable["of a linear that the model's class does not have"]
    assert counts.keys() == {name for name in added if name.endswith("weight")}
    assert any("adapter_down" in line and "stay dense" in line for line in report.warnings)


class Merging(nn.Module):
    """What peft hands out: the model inside something that can merge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config = model, model.config

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


def test_a_peft_model_is_refused_with_its_own_call():
    with refused("Merging", "merge_and_unload()"):
        prune_model(Merging(tiny_model("llama")), random_windows(), "2:4")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: model.model.layers])
def test_something_else_than_a_model_is_refused_by_its_name(wrap):
    wrapped = wrap(tiny_model("llama"))
    with refused("causal language model", type(wrapped).__name__, "no config"):
        prune_model(wrapped, random_windows(), "2:4")


# Elsewhere, or in another form


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.0.mlp.up_proj", "model.norm", "lm_head"])
def test_weights_that_are_not_in_memory_are_refused_before_any_block(where):
    model = tiny_model("llama")
    model.get_submodule(where).to("meta")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with refused(where, "not in memory"):
        prune_model(model, random_windows(), "2:4")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


class Packed4(nn.Parameter):
    """As libraries keep quantised weights."""


def quantised(linear: nn.Linear) -> None:
    linear.weight = Packed4(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


class Scales(Tensor):
    """A tensor with arithmetic of its own."""


def of_another_class(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scales))


def in_eight_bits(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "found"), [(quantised, "Packed4"), (of_another_class, "Scales"), (in_eight_bits, "float8_e4m3fn")]
)
def test_weights_that_are_no_plain_numbers_are_refused_by_what_they_are(change, found):
    model = tiny_model("llama")
    change(up_proj(model))
    with refused(f"{NAME}.weight", found, "quantis"):
        prune_model(model, random_windows(), "2:4")


class InCodes(nn.Module):
    """A linear whose weight is kept in codes and a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.codes.float() * self.scale).T


def test_a_linear_that_keeps_its_weight_in_another_form_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = InCodes(up_proj(model))
    with refused(NAME, "InCodes", "quantis"):
        prune_model(model, random_windows(), "2:4")


def test_a_linear_that_was_taken_out_is_not_missed():
    model = tiny_model("llama", num_key_value_heads=4)
    model.model.layers[1].self_attn.o_proj = nn.Identity()
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    assert len(report.layers) == 13
