"""Layer allocation: the global budget is kept to the weight, and shares follow the outliers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt import SparseGPTError
from sparsegpt.driver.allocation import SPREAD, _whole_zeros, block_shares
from sparsegpt.settings.prune_settings import resolve_settings
from tests.support import prune_model, random_windows, tiny_model


@given(
    outliers=st.lists(st.floats(0, 0.1), min_size=2, max_size=8),
    sizes=st.lists(st.integers(10, 10_000), min_size=8, max_size=8),
    target=st.floats(0.2, 0.8),
)
def test_block_shares_average_to_the_target_and_fall_with_outliers(outliers, sizes, target):
    sizes = sizes[: len(outliers)]
    shares = block_shares(outliers, sizes, target)
    mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(target)
    assert max(shares) - min(shares) <= 2 * SPREAD + 1e-9
    by_outliers = [share for _, share in sorted(zip(outliers, shares, strict=True), key=lambda pair: pair[0])]
    assert all(left >= right - 1e-12 for left, right in itertools.pairwise(by_outliers))


@given(shares=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_whole_zeros_add_up_exactly(shares, seed):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(3, 20, (len(shares), 2), generator=generator).tolist()
    linears = [{"a": (h, w), "b": (w, h)} for w, h in widths]
    total = round(sum(share * 2 * w * h for share, (w, h) in zip(shares, widths, strict=True)))
    patterns = _whole_zeros(shares, linears, total)
    zeros = [
        round(pattern.fraction * math.prod(linears[i][name]))
        for i, block in enumerate(patterns)
        for name, pattern in block.items()
    ]
    assert sum(zeros) == total


def test_owl_keeps_the_global_budget_and_differs_from_uniform():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 0] *= 50  # outliers in the first block alone
    report = prune_model(model, random_windows(), 0.6, preset="fast", allocation="owl")
    sizes = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    zeros = sum(round(layer.zeros * size) for layer, size in zip(report.layers, sizes, strict=True))
    assert zeros == round(0.6 * sum(sizes))
    by_block = [[layer.zeros for layer in report.layers if f"layers.{i}." in layer.name] for i in (0, 1)]
    assert max(by_block[0]) < min(by_block[1])


@pytest.mark.parametrize("sparsity", ["2:4", "50%/row"])
def test_patterns_that_leave_nothing_to_allocate_are_refused(sparsity):
    with pytest.raises(SparseGPTError, match="needs a fraction"):
        resolve_settings(sparsity, allocation="owl")


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(SparseGPTError, match="cannot meet"):
        block_shares([0.0, 0.1], [100, 100], 0.97)
