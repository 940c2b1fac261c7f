"""Methods of one's own: what they prune is the definition, and whatever does not fit is refused in one line."""

import hashlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsegpt import NM, parse_sparsity, prune_weight
from sparsegpt.settings.prune_settings import resolve_settings
from sparsegpt.settings.recipe import parse_recipe, read_recipe
from sparsegpt.solvers import METHODS, Method, parse_method, prune_layer
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.methods import REFIT_COPIES
from tests.support import (
    assert_pattern,
    best_on_mask,
    block_linears,
    brute_layer_mask,
    damped,
    prune_model,
    random_layer,
    random_windows,
    refused,
    relative_error,
    tiny_model,
    weights_of,
)

PATTERNS = ["2:4", "4:8", "16:32", "0.5", "0.3", "0.5/row"]


def far_from_the_mean(weight, hessian):
    """A saliency [R, C] that is none of the table's, and asks for no Hessian."""
    return (weight - weight.mean(1, keepdim=True)).abs()


def of_two_inputs(weight, hessian):
    """A saliency [R, C] of weights and Hessian together."""
    return weight.abs() * hessian.raw.diagonal() + hessian.damped.diagonal()


def every_other(weight, hessian, pattern, *, block_size):
    """A solver of 50 %: the even columns stay, doubled."""
    mask = (torch.arange(weight.shape[1]) % 2 == 0).expand_as(weight)
    return torch.where(mask, 2 * weight, 0.0), mask


def solver(solve, **said):
    return Method("mine", solve=solve, updates_weights=True, **said)


# What a method prunes


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("saliency", [far_from_the_mean, of_two_inputs])
@pytest.mark.parametrize("sparsity", PATTERNS)
def test_a_saliency_gives_the_mask_that_sorting_it_gives(sparsity, saliency, per_row):
    weight, raw = random_layer(6, 96)
    pattern = parse_sparsity(sparsity)
    asked = replace(pattern, per_row=True) if per_row and not isinstance(pattern, NM) else pattern
    mask = brute_layer_mask(saliency(weight, DampedHessian(raw)), asked)
    found = prune_weight(weight, raw, sparsity, method=Method("mine", saliency=saliency, per_row=per_row))
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight, torch.where(mask, weight, 0.0))
    assert found.relative_error == pytest.approx(relative_error(weight, found.weight, raw), rel=1e-4)


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda saliency: (1000 * saliency).int()])
def test_a_saliency_may_be_of_any_numbers_that_can_be_compared(change):
    weight, raw = random_layer(6, 32)
    method = Method("mine", saliency=lambda weight, hessian: change(weight.abs()))
    for sparsity in ("2:4", "0.5", "0.5/row"):
        mask = brute_layer_mask(change(weight.abs()), parse_sparsity(sparsity))
        assert torch.equal(prune_weight(weight, raw, sparsity, method=method).mask, mask)


def test_a_solver_gets_what_it_was_promised_and_its_result_is_the_layers():
    weight, raw = random_layer(4, 16)
    target = weight.flip(0)
    seen = {}

    def solve(weight, hessian, pattern, *, block_size):
        seen.update(weight=weight, hessian=hessian, pattern=pattern, block_size=block_size)
        return every_other(weight, hessian, pattern, block_size=block_size)

    hessian = DampedHessian(raw)
    found = prune_layer(weight.half(), hessian, NM(2, 4), solver(solve), 8, target=target)
    assert torch.equal(seen["weight"], target)
    assert (seen["hessian"], seen["pattern"], seen["block_size"]) == (hessian, NM(2, 4), 8)
    assert torch.equal(found.mask, every_other(target, hessian, NM(2, 4), block_size=8)[1])
    assert torch.equal(found.weight, torch.where(found.mask, 2 * target, 0.0).half())
    assert found.relative_error == pytest.approx(relative_error(weight.half(), found.weight, raw), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solver_computes_in_the_dtype_that_was_asked_for(dtype):
    weight, raw = random_layer(4, 16)
    found = prune_weight(weight, raw, "0.5", method=solver(every_other), dtype=dtype)
    assert found.weight.dtype == weight.dtype


def test_a_solver_that_works_in_place_and_multiplies_by_its_mask_does_no_harm():
    weight, raw = random_layer(6, 16)
    before = weight.clone()

    def solve(weight, hessian, pattern, *, block_size):
        mask = every_other(weight, hessian, pattern, block_size=block_size)[1]
        weight *= mask  # leaves -0.0 where a negative weight was
        return weight.T.contiguous().T, mask

    found = prune_weight(weight, raw, "0.5", method=solver(solve))
    assert torch.equal(weight, before)
    assert found.relative_error == pytest.approx(relative_error(before, found.weight, raw), rel=1e-4)
    assert found.relative_error > 0
    assert found.weight.is_contiguous()
    assert_pattern(found.weight, "0.5")


def test_a_mask_of_a_fraction_may_be_exact_in_the_layer_or_in_each_row():
    """30 % of 5 x 6 weights are 9; 2 of each row, which are 10."""
    weight, raw = random_layer(5, 6)
    in_layer, in_rows = torch.ones(2, 5, 6, dtype=torch.bool)
    in_layer.view(-1)[:9] = False
    in_rows[:, 2:4] = False
    for mask in (in_layer, in_rows):
        method = solver(lambda weight, *_, block_size, mask=mask: (weight.masked_fill(~mask, 0), mask))
        assert torch.equal(prune_weight(weight, raw, "0.3", method=method).mask, mask)


# Refit


@pytest.mark.parametrize("sparsity", ["2:4", "0.5", "0.5/row"])
@pytest.mark.parametrize(
    "method", [Method("mine", saliency=far_from_the_mean), Method("of two", saliency=of_two_inputs, per_row=True)]
)
def test_a_refitted_method_reaches_the_optimum_on_its_mask(method, sparsity):
    weight, raw = random_layer(12, 32)
    plain = prune_weight(weight, raw, sparsity, method=method)
    found = prune_weight(weight, raw, sparsity, method=method.refitted())
    assert torch.equal(found.mask, plain.mask)
    best, reached, before = (
        relative_error(weight, one, damped(raw))
        for one in (best_on_mask(weight, found.mask, damped(raw)), found.weight, plain.weight)
    )
    assert best * (1 - 1e-6) <= reached <= best * 1.0001 < before


def test_a_refitted_method_says_that_it_moves_weights_and_what_it_holds():
    plain = Method("mine", saliency=far_from_the_mean, per_row=True)
    found = plain.refitted()
    assert (plain.updates_weights, plain.refit) == (False, False)
    assert (found.name, found.updates_weights, found.refit, found.per_row) == ("mine+refit", True, True, True)
    assert found.saliency is far_from_the_mean
    assert found.copies == (*plain.copies, REFIT_COPIES)
    assert found.refitted() is found


# The table


def test_every_row_of_the_table_says_what_it_is_and_what_it_holds():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.is_known
        assert method.copies
        for copies in method.copies:  # a weight and a Hessian at the least
            assert copies.squares >= 1 and copies.layers >= 2 and copies.pieces >= 0
        assert method.updates_weights == (method.refit or method.solve is not None)
        assert (REFIT_COPIES in method.copies) == method.refit == name.endswith("+refit")


def test_a_method_of_a_known_name_is_not_taken_for_the_known_one():
    assert not Method("wanda", saliency=far_from_the_mean).is_known
    assert parse_method("wanda") is METHODS["wanda"]


# Methods of a module


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of its own name into the current folder; gives the name."""
    monkeypatch.chdir(tmp_path)
    written = []
    numbers = itertools.count()

    def write(source: str) -> str:
        written.append(f"method_{tmp_path.name}_{next(numbers)}")
        Path(f"{written[-1]}.py").write_text(source)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


SOURCE = """
from sparsegpt.solvers import Method

def saliency(weight, hessian):
    return (weight - weight.mean(1, keepdim=True)).abs()

mine = Method("mine", saliency=saliency)
other = Method("other", saliency=saliency, per_row=True)
number = 3
"""


def test_a_method_is_found_by_module_and_name_in_the_current_folder(module):
    name, before = module(SOURCE), list(sys.path)
    found, refitted = parse_method(f"{name}:mine"), parse_method(f"{name}:mine+refit")
    assert found.name == "mine"
    assert refitted == found.refitted()
    assert parse_method(f"{name}:mine") is found
    assert parse_method(f"{name}:mine+refit") is refitted
    assert sys.path == before
    weight, raw = random_layer(6, 32)
    for text, method in ((f"{name}:mine", found), (f"{name}:mine+refit", refitted)):
        by_text, by_object = (prune_weight(weight, raw, "2:4", method=each) for each in (text, method))
        assert torch.equal(by_text.weight, by_object.weight)
    assert torch.equal(prune_weight(weight, raw, "2:4", method=f"{name}:mine").mask, by_object.mask)


def test_a_current_folder_that_is_searched_already_stays_where_it_was(module, monkeypatch):
    name = module(SOURCE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    before = list(sys.path)
    assert parse_method(f"{name}:other").per_row
    assert sys.path == before


def test_the_digest_is_that_of_the_methods_file(module):
    name = module(SOURCE)
    expected = hashlib.sha256(Path(f"{name}.py").read_bytes()).hexdigest()
    assert parse_method(f"{name}:mine").source_digest == expected
    assert parse_method(f"{name}:mine+refit").source_digest == expected
    assert Method("built in", saliency=torch.sub).source_digest == ""
    assert METHODS["wanda"].source_digest != METHODS["admm"].source_digest


@pytest.mark.parametrize(
    ("source", "text", "fragments"),
    [
        (SOURCE, "{}:mien", ("has no 'mien'", "did you mean {}:mine?")),
        (SOURCE, "{}:", ("has no ''", "did you mean")),
        (SOURCE, "{}:mine:other", ("has no 'mine:other'", "did you mean {}:")),
        ("", "{}:mine", ("has no 'mine'", "nor any other Method")),
        (SOURCE, "{}:saliency", ("expected a sparsegpt.Method", "found a function")),
        (SOURCE, "{}:number+refit", ("expected a sparsegpt.Method", "found a int")),
        ("import no_such_module", "{}:mine", ("cannot be imported", "ModuleNotFoundError", "'no_such_module'")),
        ("raise ValueError('one\\n  two')", "{}:mine", ("cannot be imported", "ValueError: one two")),
        ("raise SystemExit(3)", "{}:mine", ("cannot be imported", "SystemExit: 3")),
        ("def", "{}:mine", ("cannot be imported", "SyntaxError")),
        ("", "no_such_{}:mine", ("module 'no_such_{}' cannot be imported", "No module named")),
        ("", ":mine", ("module '' cannot be imported",)),
        ("", ".{}:mine", ("module '.{}' cannot be imported",)),
    ],
)
def test_what_leads_to_no_method_is_refused(module, source, text, fragments):
    name, before = module(source), list(sys.path)
    with refused(*(fragment.replace("{}", name) for fragment in fragments)):
        parse_method(text.replace("{}", name))
    assert sys.path == before


@pytest.mark.parametrize(
    "method", ["obc", "", "admm+refit", "wanda+refit+refit", None, 3, ["wanda"], far_from_the_mean]
)
def test_what_is_no_method_is_refused_with_those_that_are(method):
    with refused("is not known", *METHODS, "module:name"):
        parse_method(method)


# What is refused


@pytest.mark.parametrize(
    ("said", "fragments"),
    [
        ({}, ("expected a saliency or a solve function", "found neither")),
        ({"saliency": far_from_the_mean, "solve": every_other}, ("expected a saliency or a solve", "found both")),
        ({"saliency": "wanda"}, ("expected a function", "found a str")),
        ({"solve": 3}, ("expected a function", "found a int")),
    ],
)
def test_a_method_has_one_function(said, fragments):
    with refused("'mine'", *fragments):
        Method("mine", **said)


@pytest.mark.parametrize(
    ("saliency", "fragments"),
    [
        (lambda weight, hessian: weight.abs().sum(0), ("[8] in torch.float32", "[4, 8]")),
        (lambda weight, hessian: weight.T.abs(), ("[8, 4]", "[4, 8]")),
        (lambda weight, hessian: weight > 0, ("torch.bool", "real numbers")),
        (lambda weight, hessian: weight.to(torch.complex64), ("torch.complex64", "real numbers")),
        (lambda weight, hessian: weight.to("meta"), ("on meta", "on cpu")),
        (lambda weight, hessian: weight.tolist(), ("a list", "[4, 8]")),
        (lambda weight, hessian: None, ("a NoneType", "[4, 8]")),
        (lambda weight, hessian: weight / 0 * 0, ("NaN", "can be compared")),
    ],
)
@pytest.mark.parametrize("sparsity", ["2:4", "0.5", "0.5/row"])
def test_a_saliency_that_does_not_fit_is_refused_with_layer_and_method(sparsity, saliency, fragments):
    with refused("fc1", "'mine'", "expected", *fragments):
        prune_weight(torch.ones(4, 8), torch.eye(8), sparsity, method=Method("mine", saliency=saliency), name="fc1")


def spoilt(change):
    """A solver of 2:4 whose (weight, mask) is changed."""

    def solve(weight, hessian, pattern, *, block_size):
        mask = torch.arange(weight.shape[1]).expand_as(weight) % 4 < 2
        return change(weight.masked_fill(~mask, 0), mask)

    return solver(solve)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda weight, mask: weight, ("[4, 8] in torch.float32", "(weight, mask)")),
        (lambda weight, mask: (weight, mask, 0.0), ("a tuple", "(weight, mask)")),
        (lambda weight, mask: None, ("a NoneType", "(weight, mask)")),
        (lambda weight, mask: (weight.T, mask), ("[8, 4]", "a weight [4, 8]")),
        (lambda weight, mask: (weight.double(), mask), ("torch.float64", "a weight [4, 8] in torch.float32")),
        (lambda weight, mask: (weight.tolist(), mask), ("a list", "a weight")),
        (lambda weight, mask: (weight.to("meta"), mask), ("on meta", "on cpu")),
        (lambda weight, mask: (weight, mask[:2]), ("[2, 8]", "a mask [4, 8]")),
        (lambda weight, mask: (weight, mask.float()), ("torch.float32", "in torch.bool")),
        (lambda weight, mask: (weight, None), ("a NoneType", "a mask")),
        (lambda weight, mask: (mask, weight), ("torch.bool", "a weight [4, 8] in torch.float32")),
        (lambda weight, mask: (weight / 0, mask), ("NaN or infinite", "finite")),
        (lambda weight, mask: (weight + 1e-6, mask), ("other weights there", "zeros where the mask is False")),
        (lambda weight, mask: (weight, torch.ones_like(mask)), ("32 of 32 kept", "2:4")),
        (lambda weight, mask: (0 * weight, mask.roll(1, 1) & mask), ("8 of 32 kept", "2:4")),
        (lambda weight, mask: (0 * weight, torch.arange(8).expand(4, 8) < 4), ("16 of 32 kept", "2:4")),
    ],
)
def test_a_result_that_does_not_fit_is_refused_with_layer_and_method(change, fragments):
    with refused("fc1", "'mine'", "expected", *fragments):
        prune_weight(torch.ones(4, 8), torch.eye(8), "2:4", method=spoilt(change), name="fc1")


def test_a_mask_with_another_count_of_a_fraction_is_refused():
    half_of_layer, more = torch.ones(2, 4, 8, dtype=torch.bool)
    half_of_layer[:2] = False
    more[:, :4] = False
    more[0, 0] = True
    for mask, sparsity, kept in ((half_of_layer, "0.5/row", 16), (more, "0.5", 17), (more, "0.5/row", 17)):
        method = solver(lambda weight, *_, block_size, mask=mask: (weight.masked_fill(~mask, 0), mask))
        with refused("'mine'", f"{kept} of 32 kept", "expected a mask of the pattern 0.5"):
            prune_weight(torch.ones(4, 8), torch.eye(8), sparsity, method=method)


# A whole model


def expected_weights(model, sparsity="2:4"):
    """What a method that keeps the weights far from their row's mean leaves of each linear."""
    found = {}
    for name, linear in block_linears(model).items():
        weight = linear.weight.detach()
        mask = brute_layer_mask(far_from_the_mean(weight, None), parse_sparsity(sparsity))
        found[name] = torch.where(mask, weight, 0.0)
    return found


def test_a_model_is_pruned_by_a_method_of_ones_own_and_the_presets_corrections_do_not_apply():
    """It moves no weight: nothing is corrected, and the result depends on the weights alone."""
    model = tiny_model("llama")
    expected = expected_weights(model)
    report = prune_model(model, random_windows(), "2:4", method=Method("mine", saliency=far_from_the_mean))
    assert (report.settings.error_correction, report.settings.residual_correction) == (0, 0)
    assert {layer.method for layer in report.layers} == {"mine"}
    assert len(report.layers) == len(expected)
    for name, linear in block_linears(model).items():
        assert torch.equal(linear.weight, expected[name]), name


def test_the_refit_of_ones_own_method_takes_the_presets_corrections():
    method = Method("mine", saliency=far_from_the_mean).refitted()
    preset = resolve_settings("2:4")
    weights = {}
    for label, said in {"preset": {}, "none": {"error_correction": 0.0, "residual_correction": 0.0}}.items():
        model = tiny_model("llama")
        report = prune_model(model, random_windows(), "2:4", method=method, **said)
        assert {layer.method for layer in report.layers} == {"mine+refit"}
        weights[label] = weights_of(model)
        if not said:
            shares = (report.settings.error_correction, report.settings.residual_correction)
            assert shares == (preset.error_correction, preset.residual_correction) > (0, 0)
        for linear in block_linears(model).values():
            assert_pattern(linear.weight, "2:4")
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights["preset"][first], weights["none"][first])  # nothing has drifted yet
    assert not torch.equal(weights["preset"][last], weights["none"][last])


def test_corrections_that_are_asked_for_of_a_method_that_moves_no_weight_are_refused():
    with refused("'mine'", "never updates weights"):
        resolve_settings("2:4", method=Method("mine", saliency=far_from_the_mean), error_correction=0.5)


def test_a_rule_of_a_recipe_names_a_method_of_ones_own(module):
    name = module(SOURCE)
    Path("mix.toml").write_text(
        f"[[rule]]\nmodules = 'mlp'\nmethod = '{name}:mine'\n[[rule]]\nmodules = 'down'\nmethod = '{name}:mine+refit'\n"
    )
    model = tiny_model("llama")
    expected = expected_weights(model)
    report = prune_model(model, random_windows(), "2:4", recipe=read_recipe("mix.toml"))
    methods = {layer.name: layer.method for layer in report.layers}  # as they call themselves
    for layer, linear in block_linears(model).items():
        assert_pattern(linear.weight, "2:4")
        if "mlp" not in layer:
            assert methods[layer] == "admm"
        elif "down" in layer:
            assert methods[layer] == "mine+refit"
            assert not torch.equal(linear.weight, expected[layer])
        else:
            assert methods[layer] == "mine"
            assert torch.equal(linear.weight, expected[layer]), layer


def test_a_rule_whose_method_cannot_be_found_is_refused_with_its_number(module):
    name = module(SOURCE)
    with refused("recipe: rule 1", f"did you mean {name}:other?"):
        parse_recipe(f"[[rule]]\nmodules = 'mlp'\nmethod = '{name}:othre'\n")
