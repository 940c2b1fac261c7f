"""Recipes in the driver: each linear becomes exactly what its rules say."""

import pytest
import torch

from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.settings.recipe import parse_rules
from sparsegpt.settings.selection import name_filter
from sparsegpt.solvers import METHODS, prune_layer
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.sparsity import parse_sparsity
from tests.support import (
    assert_pattern,
    block_linears,
    prune_model,
    random_windows,
    record,
    refused,
    tiny_model,
    weights_of,
)


def rule(modules: str, **said: object) -> dict[str, object]:
    return {"modules": modules, **said}


MIX = [
    rule(".", method="sparsegpt"),
    rule("q_proj", sparsity="4:8", damping=0.1),
    rule("k_proj", sparsity=0.25, method="wanda"),
    rule("v_proj|fc1|gate", skip=True),
    rule("o_proj|out_proj", sparsity="50%/row", method="magnitude+refit", block_size=8),
    rule("up_proj", sparsity=0, method="magnitude"),
    rule(r"layers\.1\..*(down_proj|fc2)", sparsity=0.6, error_correction=0.5, residual_correction=1),
]
WANTED = {"q_proj": "4:8", "k_proj": "0.25", "v_proj": None, "fc1": None, "gate_proj": None, "up_proj": None}
WANTED |= {"o_proj": "50%/row", "out_proj": "50%/row", "down_proj": "2:4", "fc2": "2:4"}


def wanted_pattern(name: str) -> str | None:
    last = name.rsplit(".", 1)[1]
    return "0.6" if ".1." in name and last in ("down_proj", "fc2") else WANTED[last]


@pytest.mark.parametrize("options", [{}, {"preset": "fast"}, {"order": "linear"}, {"reconstruct": 1}])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_every_linear_ends_with_the_pattern_of_its_rules_and_skipped_ones_keep_their_bits(model_type, options):
    model = tiny_model(model_type)
    before = weights_of(model)
    report = prune_model(model, random_windows(), "2:4", recipe=parse_rules(MIX), **options)
    layers = {layer.name: layer for layer in report.layers}
    for name, linear in block_linears(model).items():
        pattern = wanted_pattern(name)
        if pattern is not None:
            assert_pattern(linear.weight, pattern)
            assert layers[name].sparsity == str(parse_sparsity(pattern))
        elif "up_proj" not in name:
            assert name not in layers
            assert torch.equal(linear.weight, before[f"{name}.weight"])
        elif not options.get("reconstruct"):  # zero zeros: pruned by name, trained with the others
            assert torch.equal(linear.weight, before[f"{name}.weight"])
    assert {layer.method for layer in report.layers if "k_proj" in layer.name} == {"wanda"}
    assert {layer.damping for layer in report.layers if "q_proj" in layer.name} == {0.1}


BY_HAND = {
    "q_proj": ("4:8", "sparsegpt", 0.1, 128),
    "k_proj": (0.3, "wanda", 0.01, 128),
    "o_proj": ("50%/row", "magnitude+refit", 0.01, 128),
    "gate_proj": (0.5, "sparsegpt", 0.01, 8),
    "up_proj": ("2:4", "admm", 0.02, 128),
    "down_proj": ("1:4", "magnitude", 0.01, 128),
}


def test_a_mixed_recipe_is_pruning_each_linear_by_hand():
    """In block order a block's linears do not see one another: each is one call of prune_layer on the dense inputs."""
    model, windows = tiny_model("llama"), random_windows(40)
    linears = {name: linear for name, linear in block_linears(model).items() if ".layers.1." in name}
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    inputs = {name: seen[0] for name, seen in record(model, windows, linears).items()}
    rules = [
        rule(part, sparsity=sparsity, method=method, damping=damping, block_size=size)
        for part, (sparsity, method, damping, size) in BY_HAND.items()
    ]
    recipe = parse_rules([*rules, rule("v_proj", skip=True)])
    prune_model(model, windows, 0.9, preset="paper", recipe=recipe, only_blocks="1")
    for name, linear in linears.items():
        last = name.rsplit(".", 1)[1]
        if last == "v_proj":
            assert torch.equal(linear.weight, weights[name])
            continue
        sparsity, method, damping, size = BY_HAND[last]
        hessian = DampedHessian((inputs[name].T @ inputs[name]).float(), damping)
        expected = prune_layer(weights[name], hessian, parse_sparsity(sparsity), METHODS[method], size).weight
        assert torch.equal(linear.weight != 0, expected != 0), name
        torch.testing.assert_close(linear.weight, expected, rtol=1e-3, atol=1e-3)
    for name, linear in block_linears(model).items():
        assert ".layers.1." in name or (linear.weight != 0).all()


def test_blocks_behind_the_last_pruned_one_are_not_run():
    model, ran = tiny_model("llama"), []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    prune_model(model, random_windows(), "2:4", only_blocks="0", verify=False)
    assert set(ran) == {model.model.layers[0]}


def pruned(*rules: dict[str, object], **options):
    model = tiny_model("llama")
    recipe = parse_rules(list(rules)) if rules else ()
    prune_model(model, random_windows(), options.pop("sparsity", "2:4"), recipe=recipe, **options)
    return weights_of(model)


def same_bits(left, right, among: str = "") -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items() if among in name)


@pytest.mark.parametrize(
    "said",
    [
        {"sparsity": "4:8", "method": "sparsegpt", "error_correction": 0.0, "residual_correction": 1.0},
        {"sparsity": 0.4, "method": "wanda", "damping": 0.3},
        {"sparsity": "50%/row", "method": "sparsegpt+refit", "block_size": 16, "error_correction": 1.0},
    ],
)
def test_a_rule_for_everything_is_the_switches_themselves(said):
    by_rule = pruned(rule(".", **said))
    by_switches = pruned(**said)
    assert same_bits(by_rule, by_switches)
    assert not same_bits(by_rule, pruned())


def test_a_rule_that_skips_is_the_switch_that_skips():
    assert same_bits(pruned(rule("mlp|q_proj", skip=True)), pruned(select=name_filter(None, "mlp|q_proj")))


def test_linears_of_one_input_may_differ_in_everything():
    """In block order, with the first block left dense, no linear depends on how another one is pruned."""
    options = {"order": "block", "only_blocks": "1", "preset": "fast"}
    ways = {
        "q_proj": {"sparsity": "4:8", "method": "sparsegpt", "damping": 0.1},
        "k_proj": {"sparsity": 0.5, "method": "wanda+refit", "damping": 0.1},
        "v_proj": {"sparsity": "2:4", "method": "magnitude"},
        "gate_proj": {"sparsity": 0.7, "damping": 0.01},
    }
    mixed = pruned(*(rule(part, **way) for part, way in ways.items()), **options)
    for part, way in ways.items():
        assert same_bits(mixed, pruned(**{**options, **way}), f".1.{'mlp' if 'gate' in part else 'self_attn'}.{part}")
    assert same_bits(mixed, pruned(**options), "o_proj")


def test_of_linears_of_one_input_those_are_corrected_that_a_rule_names():
    """In block order the first block has nothing to correct, and in the second no linear sees another one pruned."""
    plain, corrected = (
        pruned(order="block", preset="paper", error_correction=share, residual_correction=share) for share in (0, 1)
    )
    mixed = pruned(
        rule("k_proj|down_proj|o_proj", error_correction=1, residual_correction=1), order="block", preset="paper"
    )
    for part in ("k_proj", "o_proj", "down_proj"):
        assert same_bits(mixed, corrected, part)
        assert not same_bits(mixed, plain, part)
    for part in ("q_proj", "v_proj", "gate_proj", "up_proj"):
        assert same_bits(mixed, plain, part)
        assert not same_bits(mixed, corrected, part)


def test_a_plan_covers_the_hungriest_rule():
    from sparsegpt.run.memory_plan import Workload, plan, shape_of

    shape = shape_of(tiny_model("llama").config, torch.float32)

    def memory(*rules: dict[str, object], **options: object) -> int:
        recipe = parse_rules(list(rules)) if rules else ()
        settings = resolve_settings("2:4", recipe=recipe, rotate="off", **options)
        # So few tokens that the solvers need more than the passes do.
        work = Workload(samples=8, sequence_length=1, computing=torch.float32, micro_batch=1, scored=False)
        return plan(shape, settings, work).total("memory")

    hungry = {"method": "admm", "error_correction": 0.5, "residual_correction": 0.5}
    assert memory(method="magnitude") < memory(rule("down", method="sparsegpt"), method="magnitude") < memory(**hungry)
    assert memory(rule("down", **hungry), rule("x", skip=True), method="magnitude") == memory(**hungry)
    assert memory(rule("down", method="magnitude")) == memory()


def test_lm_head_follows_its_rules():
    model = tiny_model("llama", tie_word_embeddings=True)
    prune_model(model, random_windows(), "2:4", recipe=parse_rules([rule("lm_head", sparsity=0.3)]), include_head=True)
    assert_pattern(model.lm_head.weight, 0.3)
    model = tiny_model("llama", tie_word_embeddings=True)
    report = prune_model(
        model, random_windows(), "2:4", recipe=parse_rules([rule("lm_head", skip=True)]), include_head=True
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in {layer.name for layer in report.layers}


# What is told and what is refused


def test_rules_that_do_nothing_are_warned_of():
    rules = [rule("mlp", skip=True), rule("experts", sparsity=0.5), rule("down", sparsity=0.5), rule("q", damping=1)]
    report = prune_model(tiny_model("llama"), random_windows(), "2:4", recipe=parse_rules(rules, "mix.toml"))
    first, second = report.warnings
    assert "mix.toml: rule 2" in first
    assert "'experts' matches none of the 14 linears" in first
    assert "mix.toml: rule 3" in second
    assert "'down'" in second
    assert "skipped" in second


@pytest.mark.parametrize("nothing", [{"skip": True}, {"sparsity": 0}])
def test_a_recipe_that_prunes_nothing_is_refused_before_any_work(nothing):
    model = tiny_model("llama")
    before = weights_of(model)
    with refused("prunes nothing"):
        prune_model(model, random_windows(), "2:4", recipe=parse_rules([rule(".", **nothing)]))
    assert same_bits(before, weights_of(model))


def test_widths_are_checked_against_the_pattern_of_each_linear():
    model = tiny_model("llama", intermediate_size=66)
    with refused("model.layers.1.mlp.down_proj", "66", "2:4"):
        prune_model(model, random_windows(), 0.5, recipe=parse_rules([rule(r"1\.mlp\.down", sparsity="2:4")]))
    prune_model(model, random_windows(), "2:4", recipe=parse_rules([rule("down", sparsity=0.5)]))
    for name, linear in block_linears(model).items():
        assert_pattern(linear.weight, 0.5 if "down" in name else "2:4")


def test_owl_spreads_what_rules_leave_and_keeps_its_budget():
    model = tiny_model("llama")
    rules = [rule("q_proj", sparsity="2:4"), rule("down_proj", sparsity=0.7), rule("v_proj", skip=True)]
    prune_model(model, random_windows(), 0.6, preset="fast", allocation="owl", recipe=parse_rules(rules))
    free = []
    for name, linear in block_linears(model).items():
        if "q_proj" in name or "down_proj" in name:
            assert_pattern(linear.weight, "2:4" if "q_proj" in name else 0.7)
        elif "v_proj" not in name:
            free.append(linear.weight)
    assert sum(int((weight == 0).sum()) for weight in free) == round(0.6 * sum(weight.numel() for weight in free))
    with refused("owl"):
        prune_model(model, random_windows(), 0.6, allocation="owl", recipe=parse_rules([rule(".", sparsity=0.7)]))
