"""Architectures without a row: each is pruned and proven by comparing blocks with the whole model, or refused.

What is a router, and which matrices there are, is told here by shapes in the state dict alone.
"""

import re
from pathlib import Path

import pytest
import torch

from sparsegpt.model.families import FAMILIES
from tests.more_architectures import CONFIGS, EXPERTS, REFUSED, outcome, table
from tests.support import crossed, random_windows

PRESETS = ("paper", "default")
PROVEN = sorted(set(CONFIGS) - set(REFUSED))
# A router may have outputs for what computes nothing: one in ZAYA, three in LongCat.
ROUTER_ROWS = {EXPERTS, EXPERTS + 1, EXPERTS + 3, 1}


def test_there_are_many_and_none_has_a_row():
    assert len(PROVEN) >= 40
    assert not set(CONFIGS) & set(FAMILIES)


def in_blocks(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


@crossed("model_type, preset", PROVEN, PRESETS, also=[(model_type, "paper") for model_type in PROVEN])
def test_every_matrix_is_pruned_or_named_and_no_router_is_touched(model_type, preset):
    found = outcome(model_type, preset)
    assert found.report is not None, found.refusal
    assert set(found.report.verification) == {"before", "after"}
    lists = found.report.parameters
    left = {name for counts in lists.not_prunable.values() for name in counts}
    for name, parameter in found.model.named_parameters():
        changed = not torch.equal(parameter, found.before[name])
        if parameter.ndim == 2 and (in_blocks(name) and len(parameter) in ROUTER_ROWS):
            assert not changed, name
        if in_blocks(name) and parameter.ndim > 1:
            assert changed == (name in lists.pruned), name
            assert changed or name in left, name
        else:
            assert not changed, name
    assert lists.total == sum(parameter.numel() for parameter in found.model.parameters())
    with torch.no_grad():
        assert torch.isfinite(found.model(input_ids=random_windows(), use_cache=False).logits).all()


@pytest.mark.parametrize("model_type", PROVEN)
def test_zeros_are_where_the_report_says(model_type):
    found = outcome(model_type, "paper")
    assert all(layer.zeros == 0.5 for layer in found.report.layers)
    for name, size in found.report.parameters.pruned.items():
        zeros = int((found.model.get_parameter(name) == 0).sum())
        assert zeros == size / 2, name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model_type", REFUSED)
def test_others_are_refused_in_one_line_as_they_were(model_type, preset):
    found = outcome(model_type, preset)
    assert found.report is None
    assert REFUSED[model_type] in found.refusal
    assert "\n" not in found.refusal
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, found.before[name]), name


def test_the_page_shows_what_comes_of_each():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- more architectures -->\n(.*?)\n<!-- /more architectures -->", page, re.DOTALL)
    assert shown, "docs/architectures.md has no table of architectures without a row"
    assert shown[1] == table()
