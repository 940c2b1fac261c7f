"""Allocation by outliers, through the driver: what counts as an outlier, and whose budget is shared."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sparsegpt import Unstructured
from sparsegpt.driver import allocation
from sparsegpt.driver.allocation import allocate
from sparsegpt.settings.selection import name_filter, parse_blocks
from tests.support import block_linears, prune_model, random_windows, record, refused, tiny_model


def prune(model, sparsity, **options):
    return prune_model(model, random_windows(24), sparsity, preset="fast", allocation="owl", **options)


def zeros_of(linears) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in linears)


def test_outliers_are_counted_by_their_definition(monkeypatch):
    model, found = tiny_model("llama"), []
    real = allocation.outlier_shares
    monkeypatch.setattr(allocation, "outlier_shares", lambda *args: found.extend(real(*args)) or found)
    linears = block_linears(model)
    weights = {name: linear.weight.detach().double() for name, linear in linears.items()}
    seen = record(model, random_windows(24), linears)
    prune(model, 0.5)
    assert len(found) == 2
    for index, share in enumerate(found):
        saliencies = [
            weight.abs() * seen[name][0].norm(dim=0) for name, weight in weights.items() if f".layers.{index}." in name
        ]
        count = sum(int((saliency > 5 * saliency.mean()).sum()) for saliency in saliencies)
        assert share == pytest.approx(count / sum(saliency.numel() for saliency in saliencies))


@pytest.mark.parametrize("sparsity", [0.5, 0.37, 0.7, 0.8])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_the_budget_of_the_whole_model_is_exact(model_type, sparsity):
    model = tiny_model(model_type)
    report = prune(model, sparsity)
    linears = block_linears(model).values()
    assert zeros_of(linears) == round(sparsity * sum(linear.weight.numel() for linear in linears))
    assert report.density == pytest.approx(1 - sparsity, abs=1e-4)


@pytest.mark.parametrize(("total", "fraction"), [(25, 0.5), (154, 0.25)])
def test_a_budget_that_ends_in_one_half_is_rounded_once(total, fraction, monkeypatch):
    """154 weights at 0.25 are 38.5 zeros: sums of shares in another order may round the other way."""
    blocks = {25: [[25]], 154: [[18, 22, 17, 37], [27, 33]]}[total]
    linears = [{str(i): (1, width) for i, width in enumerate(widths)} for widths in blocks]
    monkeypatch.setattr(
        allocation, "outlier_shares", lambda *args: [0.06117399304465329, 0.05056334689832342][: len(blocks)]
    )
    patterns = allocate(Unstructured(fraction), "owl", nn.ModuleList(), linears, None, nullcontext)
    zeros = [
        pattern.fraction * linears[index][name][1]
        for index, block in enumerate(patterns)
        for name, pattern in block.items()
    ]
    assert sum(map(round, zeros)) == round(fraction * total)


def test_only_selected_layers_share_the_budget():
    model = tiny_model("llama")
    report = prune(model, 0.5, select=name_filter("mlp", r"layers\.0\.mlp\.down"))
    names = {layer.name for layer in report.layers}
    assert len(names) == 5
    chosen = [linear for name, linear in block_linears(model).items() if name in names]
    assert zeros_of(chosen) == round(0.5 * sum(linear.weight.numel() for linear in chosen))


def test_a_block_without_a_selected_layer_does_not_disturb():
    model = tiny_model("llama")
    report = prune(model, 0.5, select=name_filter(r"layers\.1\."))
    assert len(report.layers) == 7
    assert zeros_of(linear for name, linear in block_linears(model).items() if ".layers.0." in name) == 0


@pytest.mark.parametrize("sparsity", [0.99, 0.01])
def test_a_budget_out_of_reach_is_refused_before_any_layer_changes(sparsity):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[::8, ::8] *= 50
    with refused("owl", f"{sparsity}", "uniform", settings=["allocation"]):
        prune(model, sparsity)
    assert zeros_of(block_linears(model).values()) == 0


@pytest.mark.parametrize("blocks", ["0:1", "1,2"])
def test_blocks_that_are_left_dense_do_not_bend_the_shares_of_others(blocks):
    chosen = parse_blocks(blocks).indices(3)
    outliers, sizes = [0.5, 0.2, 0.3], [64 if place in chosen else 0 for place in range(3)]
    with_others = allocation.block_shares(outliers, sizes, 0.9)
    alone = allocation.block_shares([outliers[place] for place in sorted(chosen)], [64] * len(chosen), 0.9)
    assert [with_others[place] for place in sorted(chosen)] == pytest.approx(alone)
    assert sum(alone) / len(alone) == pytest.approx(0.9)
