"""Masks: exact counts in every shape and pattern, ties to the earlier weight; shortcuts against the definition.

The definition, `kept_by_sorting`, is itself compared with sorting one element at a time.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt.solvers import masks
from sparsegpt.solvers.masks import (
    group_mask,
    keeps_counts,
    kept_by_sorting,
    layer_mask,
    nm_mask,
    rough_projection,
    row_mask,
    unstructured_mask,
)
from sparsegpt.sparsity import NM, Unstructured
from tests.support import brute_layer_mask, brute_mask, brute_nm_mask, brute_row_mask

PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(8, 16), NM(16, 32), NM(2, 3), NM(1, 2), NM(31, 64)]


@st.composite
def saliencies(draw, multiple: int = 1):
    """A small saliency matrix of few different values, so that ties are everywhere; also with infinities."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = st.sampled_from([0.0, 1.0, 2.0, 3.5, 1e-30, float("inf")])
    size = rows * groups * multiple
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(rows, groups * multiple)


@given(saliency=saliencies(), share=st.floats(0, 1), dim=st.sampled_from([0, 1, -1]))
def test_the_definition_is_sorting_one_element_at_a_time(saliency, share, dim):
    keep = int(share * saliency.shape[dim])
    lines = saliency.T if dim == 0 else saliency
    expected = torch.stack([brute_mask(line, keep) for line in lines])
    assert torch.equal(kept_by_sorting(saliency, keep, dim), expected.T if dim == 0 else expected)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Saliencies [R, C] of every kind that shortcuts could stumble over.
KINDS = {
    "random": lambda *shape: torch.rand(*shape, generator=generator()),
    "tied here and there": lambda *shape: torch.rand(*shape, generator=generator()).bfloat16(),
    "of three values": lambda *shape: torch.randint(3, shape, generator=generator()).float(),
    "mostly zero": lambda *shape: torch.rand(*shape, generator=generator()).sub(0.9).clamp_min(0),
    "constant": lambda *shape: torch.full(shape, 0.25),
    "zeros of both signs": lambda *shape: torch.randint(-1, 2, shape, generator=generator()).float() * 0,
    "infinite here and there": lambda *shape: torch.randint(1, 5, shape, generator=generator()).float() / 0.0,
    "rising": lambda *shape: torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape),
    "falling": lambda *shape: -torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape),
    "tiny": lambda *shape: torch.randint(4, shape, generator=generator()) * 1e-45,
}


def by_definition(saliency, pattern):
    """The mask of a layer [R, C] by `kept_by_sorting` alone."""
    rows, columns = saliency.shape
    if isinstance(pattern, NM):
        groups = saliency.view(rows, columns // pattern.m, pattern.m)
        return kept_by_sorting(groups, pattern.n, -1).view(rows, columns)
    if pattern.per_row:
        return kept_by_sorting(saliency, columns - round(pattern.fraction * columns), 1)
    kept = saliency.numel() - round(pattern.fraction * saliency.numel())
    return kept_by_sorting(saliency.flatten(), kept, 0).view(rows, columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_of_groups_are_the_definition(pattern, kind):
    for rows, groups in [(1, 1), (0, 2), (7, 1), (1, 5), (13, 6)]:
        saliency = KINDS[kind](rows, groups * pattern.m)
        before, expected = saliency.clone(), by_definition(saliency, pattern)
        assert torch.equal(nm_mask(saliency, pattern), expected)
        side_by_side = saliency.view(rows * groups, pattern.m).T
        assert torch.equal(group_mask(side_by_side, pattern.n), expected.view(rows * groups, pattern.m).T)
        assert torch.equal(saliency, before)
        assert keeps_counts(expected, pattern)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", [1, 7, 4096])  # how many values stand for all when a threshold is looked for
def test_masks_of_a_fraction_are_the_definition(sample, kind, fraction, monkeypatch):
    monkeypatch.setattr(masks, "SAMPLE", sample)
    for shape in [(1, 1), (1, 64), (64, 1), (13, 60)]:
        saliency = KINDS[kind](*shape)
        before = saliency.clone()
        for pattern in (Unstructured(fraction), Unstructured(fraction, per_row=True)):
            expected = by_definition(saliency, pattern)
            assert torch.equal(layer_mask(saliency, pattern), expected)
            assert keeps_counts(expected, pattern)
        assert torch.equal(saliency, before)


def test_counts_of_another_pattern_are_told_apart():
    rows = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    layer = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    more = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]], dtype=torch.bool)
    half, half_of_rows = Unstructured(0.5), Unstructured(0.5, per_row=True)
    for mask, kept in ((rows, (True, True, True)), (layer, (True, False, False)), (more, (False, False, False))):
        assert tuple(keeps_counts(mask, pattern) for pattern in (half, half_of_rows, NM(2, 4))) == kept
    one_in_each = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.bool)  # 30 % of 2 are 1, of 6 they are 2
    assert keeps_counts(one_in_each, Unstructured(0.3, per_row=True))
    assert keeps_counts(one_in_each, Unstructured(0.3))
    assert not keeps_counts(one_in_each, Unstructured(0.2))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(data=st.data())
def test_nm_mask_is_what_sorting_each_group_gives(pattern, data):
    saliency = data.draw(saliencies(pattern.m))
    assert torch.equal(nm_mask(saliency, pattern), brute_nm_mask(saliency, pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_nm_mask_keeps_exactly_n_of_every_group(pattern, rows, dtype):
    saliency = torch.rand(rows, 3 * pattern.m, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = nm_mask(saliency, pattern)
    assert mask.dtype == torch.bool
    assert mask.shape == saliency.shape
    assert (mask.view(rows, 3, pattern.m).sum(-1) == pattern.n).all()
    assert torch.equal(mask, brute_nm_mask(saliency, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_constant_saliency_keeps_the_first_of_every_group(pattern):
    mask = nm_mask(torch.full((3, 2 * pattern.m), 0.25), pattern)
    expected = torch.arange(2 * pattern.m) % pattern.m < pattern.n
    assert (mask == expected).all()


@given(saliency=saliencies(), share=st.floats(0, 1))
def test_unstructured_mask_is_what_sorting_everything_gives(saliency, share):
    zeros = int(share * saliency.numel())
    mask = unstructured_mask(saliency, zeros)
    assert int((~mask).sum()) == zeros
    assert torch.equal(mask, brute_mask(saliency, saliency.numel() - zeros))


@pytest.mark.parametrize("sample", [1, 2, 5])
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.0, float("inf")]) | st.floats(0, 9), min_size=16), data=st.data()
)
def test_narrowing_the_search_for_a_threshold_finds_the_same_mask(sample, values, data):
    """A large tensor's threshold is looked for around a sorted sample's: here even a small tensor counts as large."""
    zeros = data.draw(st.integers(0, len(values)))
    saliency = torch.tensor(values)
    with patch.object(masks, "SAMPLE", sample):
        assert torch.equal(unstructured_mask(saliency, zeros), brute_mask(saliency, len(values) - zeros))


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["random", "sorted", "falling", "constant", "two values", "periodic"])
def test_masks_of_large_tensors_are_exact_whatever_their_order(kind, fraction):
    size = 16 * masks.SAMPLE + 5
    saliency = {
        "random": torch.rand(size, generator=torch.Generator().manual_seed(0)),
        "sorted": torch.arange(size).float(),
        "falling": -torch.arange(size).float(),
        "constant": torch.ones(size),
        "two values": (torch.arange(size) % 3 == 0).float(),
        "periodic": (torch.arange(size) % 16).float(),  # the sample sees one value alone
    }[kind]
    zeros = round(fraction * size)
    assert torch.equal(unstructured_mask(saliency, zeros), brute_mask(saliency, size - zeros))


@given(saliency=saliencies(), share=st.floats(0, 1))
def test_row_mask_is_what_sorting_each_row_gives(saliency, share):
    zeros = int(share * saliency.shape[1])
    assert torch.equal(row_mask(saliency, zeros), brute_row_mask(saliency, zeros))


@given(saliency=saliencies(), fraction=st.floats(0, 1, exclude_max=True), per_row=st.booleans())
def test_layer_mask_drops_the_rounded_share_of_the_layer_or_of_each_row(saliency, fraction, per_row):
    pattern = Unstructured(fraction, per_row)
    assert torch.equal(layer_mask(saliency, pattern), brute_layer_mask(saliency, pattern))


@pytest.mark.parametrize("rows", [0, 2])
def test_layer_mask_of_a_pattern_is_the_group_mask(rows):
    saliency = torch.rand(rows, 8)
    assert torch.equal(layer_mask(saliency, NM(2, 4)), nm_mask(saliency, NM(2, 4)))


def rough_mask(weight, pattern, parts=1):
    """What `rough_projection` keeps of weights [R, C] without zeros, read in parts of some rows."""
    columns = [part.T.contiguous() for part in weight.chunk(parts)]
    project = rough_projection(columns, pattern)
    projected = torch.cat([project(part).T for part in columns])
    assert torch.equal(weight, torch.cat(columns, 1).T)
    mask = projected != 0
    assert torch.equal(projected[mask], weight[mask])
    return mask


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.0), Unstructured(0.3), Unstructured(0.7, True)], ids=str)
def test_rough_projection_of_a_small_layer_without_ties_is_exact(pattern):
    columns = 2 * getattr(pattern, "m", 10)
    saliency = torch.randperm(5 * columns, generator=torch.Generator().manual_seed(0)).add(1.0).view(5, columns)
    sign = torch.ones_like(saliency).index_fill(1, torch.arange(0, columns, 3), -1)
    for parts in (1, 2, 5):
        assert torch.equal(rough_mask(saliency * sign, pattern, parts), brute_layer_mask(saliency, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(data=st.data())
def test_rough_projection_differs_from_the_exact_one_by_ties_alone(pattern, data):
    saliency = data.draw(saliencies(pattern.m)) + 1
    rough, exact = rough_mask(saliency, pattern), brute_nm_mask(saliency, pattern)
    assert (rough | ~exact).all()
    groups = saliency.view(-1, pattern.m)
    smallest = groups.masked_fill(~exact.view_as(groups), float("inf")).amin(1, keepdim=True).expand_as(groups)
    extra = (rough & ~exact).reshape_as(groups)
    assert torch.equal(groups[extra], smallest[extra])


@pytest.mark.parametrize("rows", [512, 585])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_rough_projection_of_a_large_layer_keeps_about_the_share(fraction, rows, monkeypatch):
    """Rows and columns of very different sizes: a sample of some of them alone would be far off."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(rows, 1, generator=generator) * torch.rand(1024, generator=generator)
    saliency = torch.rand(rows, 1024, generator=generator) * sizes
    monkeypatch.setattr(masks, "ROUGH_SAMPLE", saliency.numel() // 45)  # 585 is 13 times 45
    kept = [rough_mask(saliency, Unstructured(fraction), parts).float().mean() for parts in (1, 4)]
    assert kept == pytest.approx([1 - fraction] * 2, abs=0.02)
