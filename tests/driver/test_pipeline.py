"""The driver against a plain reference: the whole model run again for every capture, one Hessian a linear, float64."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from sparsegpt import NM, HessianAccumulator, SparseGPTError
from sparsegpt.driver.reports import Listener
from sparsegpt.settings.prune_settings import DAMPING_PER_SHARE, DAMPING_RANGE, PruneSettings, resolve_settings
from sparsegpt.settings.selection import name_filter
from sparsegpt.solvers import admm, hessian
from tests.support import (
    assert_pattern,
    block_linears,
    damped,
    obs_oracle,
    prune_model,
    random_windows,
    record,
    refused,
    relative_error,
    tiny_model,
    weights_of,
)

# Forward order inside a block, by the last part of the names; written down again here, not taken from the code.
FORWARD_ORDER = [("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj"), ("gate_proj", "up_proj", "fc1")]
FORWARD_ORDER += [("down_proj", "fc2")]

MODELS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "opt": ("opt", {}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
}


# The reference


def residual_stream(model: nn.Module, seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Tensor | None:
    """What the output of projection `name` is added to, None where it is added to nothing."""
    block, last = name.rsplit(".", 2)[0].removesuffix(".self_attn").removesuffix(".mlp"), name.rsplit(".", 1)[1]
    if last == "fc2":
        block = name.removesuffix(".fc2")
    if last in ("o_proj", "out_proj"):
        return seen[block][0]
    if last not in ("down_proj", "fc2"):
        return None
    if not getattr(model.config, "do_layer_norm_before", True):
        return seen[f"{block}.self_attn_layer_norm"][1]
    return seen[block][0] + seen[f"{block}.self_attn.{'out_proj' if last == 'fc2' else 'o_proj'}"][1]


@torch.no_grad()
def reference(model, windows, pattern, order, error_correction=0.0, residual_correction=0.0) -> None:
    """Prune in place by the definition."""
    dense = copy.deepcopy(model)
    prefix = next(iter(block_linears(model))).split(".layers.")[0] + ".layers"
    for index in range(len(model.get_submodule(prefix))):
        names = [name for name in block_linears(model) if name.startswith(f"{prefix}.{index}.")]
        stages = [[name for name in names if name.rsplit(".", 1)[1] in stage] for stage in FORWARD_ORDER]
        for stage in [names] if order == "block" else stages:
            parts = {n: m for n, m in model.named_modules() if n.startswith(f"{prefix}.{index}")}
            now = record(model, windows, {n: m for n, m in parts.items() if "act" not in n})
            before = record(dense, windows, {n: dense.get_submodule(n) for n in now})
            for name in stage:
                weight, inputs = parts[name].weight.double(), now[name][0]
                hessian = damped(inputs.T @ inputs)
                pull = error_correction * weight @ ((before[name][0] - inputs).T @ inputs)
                if (stream := residual_stream(model, now, name)) is not None:
                    drift = residual_stream(dense, before, name) - stream
                    pull += residual_correction * drift.T @ inputs
                target = weight + pull @ torch.linalg.inv(hessian)
                parts[name].weight.copy_(obs_oracle(target, hessian, pattern)[0])


@pytest.mark.parametrize(("error", "residual"), [(0.0, 0.0), (1.0, 0.0), (0.75, 0.5)])
@pytest.mark.parametrize("order", ["block", "input"])
@pytest.mark.parametrize("variant", MODELS)
def test_pruned_weights_are_those_of_the_plain_reference(variant, order, error, residual):
    model_type, overrides = MODELS[variant]
    model, windows = tiny_model(model_type, **overrides), random_windows(48)
    expected = copy.deepcopy(model)
    reference(expected, windows, NM(2, 4), order, error, residual)
    prune_model(
        model,
        windows,
        "2:4",
        method="sparsegpt",
        order=order,
        error_correction=error,
        residual_correction=residual,
        damping=0.01,
        micro_batch=7,
    )
    for name, linear in block_linears(model).items():
        wanted = block_linears(expected)[name].weight
        assert torch.equal(linear.weight != 0, wanted != 0), name
        torch.testing.assert_close(linear.weight, wanted, rtol=1e-2, atol=2e-3)


# Orders and captures


def pruned_copy(model: nn.Module, windows: Tensor, sparsity="2:4", **options) -> tuple[nn.Module, object]:
    model = copy.deepcopy(model)
    return model, prune_model(model, windows, sparsity, **options)


@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_capture_for_every_linear_changes_nothing_but_the_cost(model_type, correction):
    model, windows = tiny_model(model_type), random_windows(40)
    options = {"method": "sparsegpt", "error_correction": correction, "residual_correction": correction}
    shared, _ = pruned_copy(model, windows, order="input", **options)
    single, _ = pruned_copy(model, windows, order="linear", **options)
    for name, tensor in shared.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 7, 40])
def test_the_size_of_a_micro_batch_does_not_matter(micro_batch):
    model, windows = tiny_model("llama"), random_windows(40)
    options = {"preset": "fast", "method": "magnitude+refit"}  # masks that rounding cannot flip
    whole, _ = pruned_copy(model, windows, **options)
    parts, _ = pruned_copy(model, windows, micro_batch=micro_batch, **options)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("order", "hessians"), [("block", 4), ("input", 4), ("linear", 7)])
def test_linears_of_one_input_share_one_hessian(order, hessians, monkeypatch):
    added = []
    real = HessianAccumulator.add
    monkeypatch.setattr(HessianAccumulator, "add", lambda self, inputs: (added.append(inputs), real(self, inputs)))
    prune_model(tiny_model("llama"), random_windows(), "2:4", preset="fast", order=order)
    assert len(added) == 2 * hessians


@pytest.mark.parametrize("variant", MODELS)
def test_reported_errors_are_measured_on_the_inputs_of_the_pruned_model(variant):
    """In input order everything before a layer is final when it is solved: its inputs are the pruned model's."""
    model_type, overrides = MODELS[variant]
    model, windows = tiny_model(model_type, **overrides), random_windows(40)
    linears = {**block_linears(model), "lm_head": model.lm_head}
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    report = prune_model(model, windows, "2:4", include_head=True, damping=0.02)
    seen = record(model, windows, linears)
    assert len(report.layers) == len(linears)
    for layer in report.layers:
        inputs, weight = seen[layer.name][0], linears[layer.name].weight
        expected = relative_error(dense[layer.name], weight.detach(), inputs.T @ inputs)
        assert layer.relative_error == pytest.approx(expected, rel=1e-3), layer.name
        assert layer.tokens == windows.numel()
        assert layer.shape == tuple(weight.shape)
        assert layer.zeros == pytest.approx(0.5)
        assert layer.sparsity == "2:4"
        assert layer.damping == 0.02


@pytest.mark.parametrize(("samples", "expected"), [(1, "top"), (40, "between"), (5000, "bottom")])
def test_damping_follows_the_sampling_error_unless_one_is_set(samples, expected):
    settings = resolve_settings("2:4")
    low, high = DAMPING_RANGE
    wanted = {"top": high, "between": DAMPING_PER_SHARE * 32 / (16 * samples), "bottom": low}[expected]
    assert settings.damping_for(32, 16 * samples) == pytest.approx(wanted)
    assert low <= wanted <= high
    assert resolve_settings("2:4", damping=0.5).damping_for(32, 16 * samples) == 0.5
    assert resolve_settings("2:4", "paper").damping_for(32, 16 * samples) == 0.01


FULL_CORRECTION = {"error_correction": 1.0, "residual_correction": 1.0}
NO_CORRECTION = dict.fromkeys(FULL_CORRECTION, 0.0)


def test_full_correction_is_the_identity_while_nothing_upstream_is_pruned():
    model, windows = tiny_model("llama"), random_windows()
    first_input = name_filter(r"layers\.0\.self_attn\.[qkv]_proj")
    corrected, _ = pruned_copy(model, windows, **FULL_CORRECTION, select=first_input)
    plain, report = pruned_copy(model, windows, **NO_CORRECTION, select=first_input)
    assert len(report.layers) == 3
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, corrected.state_dict()[name]), name


def test_correction_is_also_the_identity_behind_blocks_that_stay_dense():
    model, windows = tiny_model("opt"), random_windows()
    late = name_filter(r"layers\.1\.self_attn\.out_proj")
    corrected, _ = pruned_copy(model, windows, **FULL_CORRECTION, select=late)
    plain, _ = pruned_copy(model, windows, **NO_CORRECTION, select=late)
    assert torch.equal(
        corrected.model.decoder.layers[1].self_attn.out_proj.weight,
        plain.model.decoder.layers[1].self_attn.out_proj.weight,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_half_precision_models_keep_their_dtype(dtype, preset):
    model = tiny_model("llama").to(dtype)
    prune_model(model, random_windows(), "2:4", preset=preset)
    for linear in block_linears(model).values():
        assert linear.weight.dtype == dtype
        assert_pattern(linear.weight, "2:4")


@pytest.mark.parametrize("sparsity", ["4:8", "0.5", "0.3", "0.5/row", "16:32"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "sparsegpt+refit", "admm"])
def test_every_pattern_is_exact_for_every_method(sparsity, method):
    model = tiny_model("llama")
    report = prune_model(model, random_windows(), sparsity, method=method)
    for linear in block_linears(model).values():
        assert_pattern(linear.weight, sparsity)
    assert report.as_dict()["method"] == method


# What is told meanwhile


def test_reports_come_one_a_layer_in_forward_order_and_one_a_block():
    layers, blocks = [], []
    listener = Listener()
    listener.layer, listener.block = layers.append, blocks.append
    report = prune_model(tiny_model("llama"), random_windows(), "2:4", listener=listener)
    assert layers == report.layers
    assert blocks == report.blocks
    order = [name for stage in FORWARD_ORDER for name in stage]
    names = [layer.name.rsplit(".", 1)[1] for layer in layers]
    stage_of = [next(i for i, stage in enumerate(FORWARD_ORDER) if name in stage) for name in names[:7]]
    assert set(names) <= set(order)
    assert stage_of == sorted(stage_of)
    assert [(block.index, block.blocks) for block in blocks] == [(0, 2), (1, 2)]
    for index, block in enumerate(blocks):
        errors = [layer.relative_error for layer in layers if f"layers.{index}." in layer.name]
        assert block.relative_error == pytest.approx(sum(errors) / 7)


def test_too_few_tokens_for_a_width_are_warned_of_with_the_numbers():
    report = prune_model(tiny_model("llama"), random_windows(2, 20), "2:4")
    assert len(report.warnings) == 1  # told once of the width of 64 in both blocks; 40 tokens are enough for 32
    assert all("down_proj" in warning and "40" in warning and "64" in warning for warning in report.warnings)
    assert not prune_model(tiny_model("llama"), random_windows(4, 20), "2:4").warnings


# What is chosen


def test_only_selected_layers_are_pruned():
    model = tiny_model("llama")
    before = weights_of(model)
    report = prune_model(model, random_windows(), "2:4", select=name_filter(r"layers\.1\.mlp", "up_proj"))
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (
            name.removesuffix(".weight") not in {x.name for x in report.layers}
        )


def test_the_model_is_left_in_the_mode_it_came_in():
    model = tiny_model("llama").train()
    prune_model(model, random_windows(), "2:4")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(SparseGPTError):
        prune_model(model, random_windows(), "2:4", select=lambda name: False)
    assert model.training


# What is refused


def refusal_leaves_the_model_alone(model, *fragments, sparsity="2:4", **options):
    before = weights_of(model)
    with refused(*fragments):
        prune_model(model, random_windows(), sparsity, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_width_that_groups_do_not_divide_is_refused_before_any_work():
    model = tiny_model("llama", intermediate_size=66)
    refusal_leaves_the_model_alone(model, "layers.0.mlp.down_proj", "66", "leave this layer out")
    report = prune_model(model, random_windows(), "2:4", select=name_filter(None, "down_proj"))
    assert len(report.layers) == 12


def test_weights_with_nan_are_refused_before_any_work():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    refusal_leaves_the_model_alone(model, "model.layers.1.mlp.up_proj", "NaN")


def test_no_selected_layer_is_refused():
    refusal_leaves_the_model_alone(tiny_model("llama"), "no linear layer is selected", select=lambda name: False)


@pytest.mark.parametrize("preset", ["paper", "default"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(value, preset):
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[7] = value
    with refused("model.layers.1.mlp.", "NaN or infinite activations"):
        prune_model(model, random_windows(), "2:4", preset=preset)


@pytest.mark.parametrize(
    "windows",
    [
        torch.zeros(8, dtype=torch.long),
        torch.zeros(0, 8, dtype=torch.long),
        torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(2, 8),
        torch.zeros(1, 2, 8, dtype=torch.long),
    ],
)
def test_windows_of_another_shape_are_refused(windows):
    with refused("[samples, sequence_length]"):
        prune_model(tiny_model("llama"), windows, "2:4")


@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_that_the_model_does_not_know_are_refused(token):
    model = tiny_model("llama", vocab_size=64)
    windows = random_windows(2)
    windows[1, 3] = token
    with refused("token ids below 64", str(token), "tokenizer"):
        prune_model(model, windows, "2:4")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"error_correction": 1.5}, ("error correction", "1.5", "between 0 and 1")),
        ({"residual_correction": -0.1}, ("residual correction", "-0.1")),
        ({"error_correction": float("nan")}, ("error correction",)),
        ({"method": "magnitude", "error_correction": 0.5}, ("'magnitude'", "never updates weights")),
        ({"method": "wanda", "residual_correction": 0.5}, ("'wanda'", "wanda+refit")),
        ({"method": "obc"}, ("'obc'", "sparsegpt", "admm")),
        ({"preset": "fastest"}, ("'fastest'", "paper", "best")),
        ({"damping": -0.01}, ("damping",)),
        ({"damping": float("nan")}, ("damping",)),
        ({"block_size": 0}, ("block size",)),
        ({"block_size": 6}, ("block size", "2:4")),
        ({"reconstruct": -1}, ("epochs",)),
        ({"reconstruct": 1, "look_ahead": -1}, ("look-ahead", "-1")),
        ({"look_ahead": 2}, ("look-ahead", "epochs")),
        ({"distill": -1}, ("distillation", "epochs")),
        ({"distill": 1, "distill_rate": 0.0}, ("distillation", "rate")),
        ({"distill_rate": math.inf}, ("distillation", "rate")),
        ({"learning_rate": 0.0}, ("learning rate",)),
        ({"learning_rate": float("nan")}, ("learning rate",)),
        ({"order": "random"}, ("random",)),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, fragments):
    with refused(*fragments):
        resolve_settings("2:4", **options)


def test_explicit_settings_win_over_the_preset():
    settings = resolve_settings("50%", "best", method="sparsegpt", error_correction=0.0, reconstruct=None)
    assert settings.method == "sparsegpt"
    assert settings.error_correction == 0
    assert settings.reconstruct > 0
    assert settings.residual_correction > 0


def test_paper_is_the_published_algorithm_with_nothing_added():
    settings = resolve_settings("2:4", "paper")
    assert settings == PruneSettings(NM(2, 4), method="sparsegpt", order="block", damping=0.01, block_size=128)
    assert not settings.needs_dense_stream


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_methods_that_cannot_correct_run_under_every_preset(method):
    for preset in ("paper", "fast", "default"):
        assert not resolve_settings("2:4", preset, method=method).corrects


@pytest.mark.parametrize("preset", ["default", "fast"])
def test_linears_of_one_input_share_one_factor_which_the_last_lets_go(preset, monkeypatch):
    factored, left = [], []
    real = hessian.DampedHessian._factorised.func

    def count(self):
        factored.append(self.name)
        return real(self)

    counted = functools.cached_property(count)
    counted.__set_name__(hessian.DampedHessian, "_factorised")
    monkeypatch.setattr(hessian.DampedHessian, "_factorised", counted)
    search = admm.search

    def look(weight, shared, *rest):
        found = search(weight, shared, *rest)
        left.append("_factorised" in vars(shared))
        return found

    monkeypatch.setattr(admm, "search", look)
    prune_model(tiny_model("llama"), random_windows(), "2:4", preset=preset)
    assert len(factored) == len(set(factored)) == 2 * 4
    assert left == 2 * [True, True, False, False, True, False, False]  # q k v, o, gate up, down
