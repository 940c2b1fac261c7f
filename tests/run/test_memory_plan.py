"""Plans: sums of named parts from shapes alone, the documented table, and refusals before any work."""

import re
from pathlib import Path

import pytest
import torch

from sparsegpt.run import memory_plan as plan_module
from sparsegpt.run.memory import readable
from sparsegpt.run.memory_plan import PUBLISHED, Plan, Workload, check_fits, plan, published_config, shape_of
from sparsegpt.settings.prune_settings import resolve_settings
from tests.architectures import VARIANTS, block_matrices, tiny_variant
from tests.support import refused, tiny_model

DOCUMENT = (Path(__file__).parents[2] / "docs/memory-and-resume.md").read_text(encoding="utf-8")
GPU = 80 * 10**9


def planned(name: str, preset: str, activations: str = "memory") -> Plan:
    config = published_config(name)
    work = Workload(128, 2048, config.dtype, GPU, activations)
    return plan(shape_of(config, config.dtype), resolve_settings("2:4", preset), work)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_counted_without_weights(variant):
    model = tiny_variant(variant)
    shape = shape_of(model.config, torch.float32)
    assert shape.parameters >= sum(parameter.numel() for parameter in model.parameters())
    widths = {matrix.shape[1] for matrix in block_matrices(model).values()}
    assert max(group.inputs for group in shape.groups) >= max(widths)


def test_a_plain_block_is_counted_exactly():
    model = tiny_model("llama")
    shape = shape_of(model.config, torch.float32)
    block = model.model.layers[0]
    assert shape.blocks == 2
    assert shape.block_parameters == sum(parameter.numel() for parameter in block.parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sorted(group.inputs for group in shape.groups) == [32, 32, 32, 64]  # q k v; o; gate up; down
    assert sorted(group.linears for group in shape.groups) == [1, 1, 2, 3]


def test_the_published_method_carries_one_stream_and_corrections_carry_what_they_compare():
    shape = shape_of(tiny_model("llama").config, torch.float32)
    work = Workload(10, 20, torch.float32)
    token = 4 * 10 * 20
    assert plan(shape, resolve_settings("2:4", "paper"), work).memory["activations"] == 32 * token
    # Two streams, four inputs of shared groups, two residual streams, attention's output.
    features = 2 * 32 + (3 * 32 + 64) + 2 * 32 + 32
    assert plan(shape, resolve_settings("2:4"), work).memory["activations"] == features * token
    on_disk = plan(shape, resolve_settings("2:4"), Workload(10, 20, torch.float32, activations="disk"))
    assert "activations" not in on_disk.memory
    assert on_disk.disk["activations"] == (features - 32) * token


def test_distillation_keeps_float32_weights_and_two_moments_of_all_blocks():
    model = tiny_model("llama")
    weights = sum(p.numel() for p in model.model.layers.parameters())
    shape, settings = shape_of(model.config, torch.bfloat16), resolve_settings("2:4", distill=1)
    plain = plan(shape, resolve_settings("2:4"), Workload(10, 20, torch.float32))
    here = plan(shape, settings, Workload(10, 20, torch.float32))
    there = plan(shape, settings, Workload(10, 20, torch.float32, activations="disk"))
    assert here.memory["weights in training"] == there.disk["weights in training"] == 12 * weights
    assert "weights in training" not in there.memory
    # The last epoch's state while the next one is written, and the blocks once more in the checkpoint's dtype.
    assert here.total("disk") - plain.total("disk") == 2 * 12 * weights + 2 * weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_they_are_named_for(name):
    shape = shape_of(published_config(name), torch.float16)
    assert shape.parameters / 1e9 == pytest.approx(float(re.search(r"(\d+)b", name)[1]), rel=0.02)


def test_the_readme_shows_what_the_code_computes():
    rows = re.findall(r"\| (\S+) \| (paper|default) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|\n", DOCUMENT)
    assert {(model, preset) for model, preset, *_ in rows} == {(n, p) for n in PUBLISHED for p in ("paper", "default")}
    for name, preset, memory, on_disk, gpu, disk in rows:
        here, there = planned(name, preset), planned(name, preset, "disk")
        assert memory == readable(here.total("memory"))
        assert on_disk == readable(there.total("memory"))
        assert gpu.split(",")[0] == readable(here.total("gpu"))
        assert ("refused" in gpu) == (here.total("gpu") > GPU)
        assert disk == f"{readable(here.total('disk'))}, {readable(there.total('disk'))}"


def test_what_does_not_fit_is_refused_with_the_switch_that_helps(tmp_path, monkeypatch):
    plenty = {"part": 1}
    monkeypatch.setattr(plan_module, "available_memory", lambda: 1000)
    check_fits(Plan({"part": 999}, {}, plenty, 1), None, tmp_path, tmp_path)
    with refused("memory", "--activations disk"):
        check_fits(Plan({"part": 900, "activations": 200}, {}, plenty, 1), None, tmp_path, tmp_path)
    with refused("memory", "--samples"):
        check_fits(Plan({"part": 1100}, {}, plenty, 1), None, tmp_path, tmp_path)
    with refused("memory", "--activations disk", "--distill 0"):
        distilled = {**plenty, "epochs of distillation": 1}
        check_fits(Plan({"part": 900, "weights in training": 200}, {}, distilled, 1), None, tmp_path, tmp_path)
    with refused("GPU memory", "--micro-batch", "--preset paper"):
        check_fits(Plan({"part": 1}, {"part": 2000}, plenty, 1), 1000, tmp_path, tmp_path)
    with refused("disk", "--out", str(tmp_path)):
        check_fits(Plan({"part": 1}, {}, {"result": 1 << 60}, 1), None, tmp_path / "not" / "there", tmp_path)
    with refused("disk", "--scratch"):
        check_fits(Plan({"part": 1}, {}, {"activations": 1 << 60}, 1), None, tmp_path, tmp_path)


def test_ranks_share_activations_and_send_sums_and_weights():
    """The traffic of a ring by hand: 2 (W - 1) / W of what is all-reduced, (W - 1) / W of what is passed on."""
    shape = shape_of(tiny_model("llama").config, torch.float32)
    settings = resolve_settings("2:4", "paper")
    alone, four = (plan(shape, settings, Workload(8, 16, torch.float32, ranks=ranks)) for ranks in (1, 4))
    assert four.memory["activations"] * 4 == alone.memory["activations"]
    assert alone.traffic == {}
    # Inputs of width 32 for q, k, v; for o; for gate, up; and of width 64 for down. Two blocks.
    sums, weights = 4 * (3 * 32**2 + 64**2), 4 * shape.block_parameters
    assert four.traffic == {"sums": 2 * 2 * sums * 3 // 4, "solved weights": 2 * weights * 3 // 4}
    trained = plan(shape, resolve_settings("2:4", "paper", distill=2), Workload(80, 16, torch.float32, ranks=4))
    # 64 windows of 16 tokens a step, 72 of 80 windows: 2 steps an epoch.
    assert trained.traffic["gradients"] == 2 * 2 * 2 * 2 * weights * 3 // 4
