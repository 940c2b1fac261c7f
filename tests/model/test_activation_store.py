"""Activations in files give the bits that activations in memory give."""

import pytest
import torch

from sparsegpt.files.mapped import is_mapped
from sparsegpt.model.streams import ActivationStore
from sparsegpt.run import job as run_module
from sparsegpt.run import planning
from sparsegpt.run.job import run
from sparsegpt.run.options import RunOptions
from sparsegpt.run.planning import plan_run
from sparsegpt.settings.prune_settings import resolve_settings
from tests.support import prune_model, random_windows, save_model, tiny_model, weights_of, write_text


def test_in_memory_a_tensor_stays_the_same_tensor():
    tensor = torch.ones(3)
    assert ActivationStore().keep("pruned", 0, tensor) is tensor


def test_a_role_and_a_step_have_one_file_each_whose_memory_is_used_again(tmp_path):
    store = ActivationStore(tmp_path)
    first = store.keep("pruned", 0, torch.ones(2, 3))
    others = [store.keep("pruned", 1, torch.full((2, 3), 2.0)), store.keep("dense", 0, torch.full((2, 3), 3.0))]
    assert is_mapped(first)
    again = store.keep("pruned", 0, torch.full((2, 3), 4.0))
    assert again.data_ptr() == first.data_ptr()
    assert [float(tensor[0, 0]) for tensor in (again, *others)] == [4, 2, 3]


def test_another_shape_or_dtype_gets_a_file_of_its_own(tmp_path):
    store = ActivationStore(tmp_path)
    first = store.keep("pruned", 0, torch.ones(2, 3))
    assert torch.equal(store.keep("pruned", 0, torch.zeros(5, 3)), torch.zeros(5, 3))
    half = store.keep("pruned", 0, torch.zeros(2, 3, dtype=torch.float16))
    assert half.dtype == torch.float16
    assert torch.equal(first, torch.ones(2, 3))


def test_a_tensor_computed_from_the_file_of_its_own_place_may_replace_it(tmp_path):
    store = ActivationStore(tmp_path)
    tensor = store.keep("pruned", 0, torch.arange(6.0))
    assert torch.equal(store.keep("pruned", 0, tensor.flip(0)), torch.arange(6.0).flip(0))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper"},
        {"preset": "fast"},
        {},
        {"preset": "best", "reconstruct": 1, "distill": 1},
        {"include_head": True},
    ],
    ids=str,
)
def test_files_change_no_bit_of_the_result(tmp_path, model_type, options):
    options = {"method": "sparsegpt", **options}
    weights = []
    for scratch in (None, tmp_path):
        model = tiny_model(model_type)
        # 5 windows in steps of 2: the last micro-batch has another shape.
        prune_model(model, random_windows(5), "2:4", micro_batch=2, scratch=scratch, **options)
        weights.append(weights_of(model))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("activations", "available", "tight"),
    [("memory", 10, False), ("memory", 2, True), ("memory", None, False), ("disk", 10, True)],
)
def test_freed_memory_goes_back_at_once_only_where_memory_is_scarce(
    tmp_path, monkeypatch, activations, available, tight
):
    """available: in units of what the run can do with."""
    called = []
    options = RunOptions(
        model=str(save_model(tmp_path / "model")),
        calibration=str(write_text(tmp_path / "text.txt")),
        evaluate=(),
        out=tmp_path / "out",
        samples=2,
        sequence_length=16,
        activations=activations,
    )
    needed = plan_run(options, resolve_settings("2:4")).total("memory")
    monkeypatch.setattr(run_module, "give_back_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(planning, "available_memory", lambda: available and available * needed)
    run(options, resolve_settings("2:4"))
    assert called == [True] * tight
